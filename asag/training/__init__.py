"""What the training of every family is made of: assignment, random draws, timing."""

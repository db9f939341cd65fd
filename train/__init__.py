"""Training of any family's detectors: data, steps, schedules, checkpoints, the loop and its evaluation."""

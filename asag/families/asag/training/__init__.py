"""How ASAG is trained."""

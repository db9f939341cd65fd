"""How detectors of this family train."""

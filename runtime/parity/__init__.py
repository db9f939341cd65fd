"""Whether a model gives the detections of its reference, and where differences start."""

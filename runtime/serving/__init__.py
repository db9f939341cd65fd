"""A model repository of Triton Inference Server, its client, and its Python backend's model."""

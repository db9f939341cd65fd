"""From a PyTorch checkpoint to one ONNX file."""

"""Building TensorRT and TensorRT-RTX engines, and the manifest beside them."""

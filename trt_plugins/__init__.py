"""The custom ops as CUDA kernels and TensorRT plugins."""

"""What `python -m trt_plugins.bench` is made of: contenders, timing, the GPU's limits, results and their report."""

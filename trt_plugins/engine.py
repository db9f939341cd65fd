"""An exported model becomes a TensorRT engine with the custom ops' kernels inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trt_plugins.launch import current_capability
from trt_plugins.plugins import register_plugins


def build_engine(
    model: str | Path | bytes, batch: tuple[int, int, int] = (1, 1, 8), just_in_time: bool = False
) -> bytes:
    """Build a serialized engine for the current GPU.

    model: an ONNX file or its content; batch: fewest, most usual and most images of one run, for a model with a dynamic
    batch; just_in_time: let the engine call back into Python for the ops instead of holding their kernels.
    Raises ValueError where TensorRT or a GPU is missing, and where TensorRT refuses the model or builds no engine.
    """
    register_plugins(current_capability())
    import tensorrt as trt

    content = model if isinstance(model, bytes) else Path(model).read_bytes()
    what = "the model" if isinstance(model, bytes) else str(model)
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flag = trt.NetworkDefinitionCreationFlag
    preference = flag.PREFER_JIT_PYTHON_PLUGINS if just_in_time else flag.PREFER_AOT_PYTHON_PLUGINS
    # TensorRT 11 knows strongly typed networks only; for 10 it has to be said.
    network = builder.create_network(1 << int(flag.STRONGLY_TYPED) | 1 << int(preference))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        raise ValueError(f"TensorRT does not take {what}: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32: engines are compared with PyTorch
    if profile := _profile(builder, network, batch):
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ValueError(f"TensorRT built no engine of {what}; its messages on the terminal say why")
    return bytes(engine)


def _profile(builder: Any, network: Any, batch: tuple[int, int, int]) -> Any:
    """Sizes of the first axis where it is dynamic; None for a model of fixed shapes."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if all(-1 not in tuple(tensor.shape) for tensor in inputs):
        return None
    profile = builder.create_optimization_profile()
    for tensor in inputs:
        rest = tuple(tensor.shape)[1:]
        if -1 in rest:
            raise ValueError(f"input {tensor.name} has shape {tuple(tensor.shape)}; only the batch may be dynamic")
        profile.set_shape(tensor.name, *((size, *rest) for size in batch))
    return profile

"""Model repositories for Triton Inference Server: the configuration, the model, its labels and warm-up data."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asag.runtime.engines.manifest import manifest_path
from asag.runtime.files import atomic_folder
from asag.runtime.metadata import ModelMetadata

LARGEST_DEFAULT_BATCH = 8
"""Most images of a batch where the file itself sets no limit."""

WARMUP_SIZES = "sizes"
"""Name of the file with the content's height and width for warming up."""


@dataclasses.dataclass(frozen=True)
class Raw:
    """A name of the configuration language, written without quotes: an enumeration's value."""

    text: str


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What a repository needs to know of a model file.

    ``backend`` is Triton's name of what runs it; ``largest_batch`` the most images at once; ``tuned_batches`` the
    batch sizes that an engine has profiles for.
    """

    path: Path
    metadata: ModelMetadata
    backend: str
    largest_batch: int
    tuned_batches: tuple[int, ...] = ()


def write_repository(
    model_path: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    name: str | None = None,
    device: str = "cpu",
    max_batch: int | None = None,
    instances: int = 1,
    queue_delay_us: int = 1000,
    threads: int | None = None,
) -> Path:
    """Write a Triton model repository with one model and return the model's folder.

    An .onnx file is served by Triton's ONNX Runtime backend. A TensorRT-RTX .engine is not what Triton's TensorRT
    backend opens; it is served by the Python backend, whose environment needs this package. ``name`` is the preset's by
    default, ``device`` "cpu" or "cuda" (an engine is always on the GPU), ``instances`` how many run per device,
    ``queue_delay_us`` the microseconds that a request may wait for others to share its batch, ``threads`` the CPU
    threads of an instance. The model's folder appears whole or not at all.

    Raises ValueError for a model that cannot be read, a name that is no folder's name, a batch that the model does not
    take, or a folder that exists already.
    """
    model = _served(Path(model_path), max_batch)
    name = model.metadata.preset if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(f"{name!r} is no name for a served model; use letters, digits, '-', '_' and '.'")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}: use cpu or cuda")
    repository = Path(repository)
    if repository.exists() and not repository.is_dir():
        raise ValueError(f"cannot write to {repository}: it is a file; name a folder")
    folder = repository / name
    if folder.exists():
        raise ValueError(f"{folder} exists; remove it, or choose another --name")
    on_gpu = device == "cuda" or model.backend == "python"
    text = configuration(
        model, name, on_gpu=on_gpu, instances=instances, queue_delay_us=queue_delay_us, threads=threads
    )
    with atomic_folder(folder) as temporary:
        (temporary / "config.pbtxt").write_text(text, encoding="utf-8")
        ids, names = model.metadata.category_ids, model.metadata.category_names
        labels = "".join(f"{number} {label}\n" for number, label in zip(ids, names, strict=True))
        (temporary / "labels.txt").write_text(labels, encoding="utf-8")
        (temporary / "warmup").mkdir()
        size = np.array(model.metadata.input_size, np.float32)
        (temporary / "warmup" / WARMUP_SIZES).write_bytes(size.tobytes())
        version = temporary / "1"
        version.mkdir()
        target = version / f"model{model.path.suffix.lower()}"
        shutil.copyfile(model.path, target)
        if model.backend == "python":
            shutil.copyfile(manifest_path(model.path), manifest_path(target))
            shutil.copyfile(Path(__file__).with_name("model.py"), version / "model.py")
    return folder


def _served(path: Path, max_batch: int | None) -> ServedModel:
    """Read the model file as far as its description goes."""
    if path.suffix.lower() == ".engine":
        from asag.runtime.engines.manifest import read_engine

        if not path.exists():
            raise FileNotFoundError(f"model not found: {path}")
        _, manifest = read_engine(path)
        tuned = tuple(preferred for _, preferred, _ in manifest.profiles)
        found = ServedModel(path, manifest.metadata, "python", manifest.largest_batch, tuned)
        if manifest.smallest_batch > 1:
            raise ValueError(f"{path} has a fixed batch of {manifest.smallest_batch}; Triton needs one that takes 1")
        limit: int | None = manifest.largest_batch
    elif path.suffix.lower() == ".onnx":
        from asag.runtime.opening import open_session

        with open_session(path, threads=1) as session:
            limit = session.max_batch
            found = ServedModel(path, session.metadata, "onnxruntime", limit or LARGEST_DEFAULT_BATCH)
        if limit is not None:
            raise ValueError(f"{path} has a fixed batch of {limit}; export it with a dynamic batch")
    else:
        raise ValueError(f"cannot serve {path}: expected .onnx or .engine")
    if max_batch is not None:
        if limit is not None and max_batch > limit:
            raise ValueError(f"{path} takes at most {limit} images at once, not {max_batch}")
        found = dataclasses.replace(found, largest_batch=max_batch)
    return found


def configuration(
    model: ServedModel, name: str, *, on_gpu: bool, instances: int, queue_delay_us: int, threads: int | None
) -> str:
    """The model's configuration (config.pbtxt) in Triton's text format."""
    metadata, largest = model.metadata, model.largest_batch
    pixels = Raw("TYPE_UINT8" if metadata.input_type == "uint8" else "TYPE_FP32")
    count = metadata.max_detections
    parameters = metadata.to_properties()
    if threads is not None and model.backend == "onnxruntime":
        parameters["intra_op_thread_count"] = str(threads)
    batches = sorted({1, largest, *(size for size in model.tuned_batches if size <= largest)})
    values: dict[str, Any] = {
        "name": name,
        "backend": model.backend,
        "max_batch_size": largest,
        "input": [
            {"name": "images", "data_type": pixels, "dims": [3, *metadata.input_size]},
            {"name": "sizes", "data_type": Raw("TYPE_FP32"), "dims": [2]},
        ],
        "output": [
            {"name": "boxes", "data_type": Raw("TYPE_FP32"), "dims": [count, 4]},
            {"name": "scores", "data_type": Raw("TYPE_FP32"), "dims": [count]},
            {"name": "labels", "data_type": Raw("TYPE_INT64"), "dims": [count]},
            # One number per image: the model has no dimension for it, and the server wants at least one.
            {"name": "overflow", "data_type": Raw("TYPE_INT32"), "dims": [1], "reshape": {"shape": []}},
        ],
        "instance_group": [{"count": instances, "kind": Raw("KIND_GPU" if on_gpu else "KIND_CPU")}],
        "dynamic_batching": {"max_queue_delay_microseconds": queue_delay_us},
        "model_warmup": [_warmup(size, pixels, metadata.input_size) for size in batches],
        "parameters": [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()],
    }
    tuned = [size for size in model.tuned_batches if 1 < size <= largest]
    if tuned:
        values["dynamic_batching"]["preferred_batch_size"] = tuned
    if model.backend == "onnxruntime":
        values["default_model_filename"] = "model.onnx"
    else:
        del values["output"][3]["reshape"]  # the Python backend gives the shape that is served
    return "\n".join(_lines(values)) + "\n"


def _warmup(batch: int, pixels: Raw, size: tuple[int, int]) -> dict[str, Any]:
    images = {"data_type": pixels, "dims": [3, *size], "random_data": True}
    sizes = {"data_type": Raw("TYPE_FP32"), "dims": [2], "input_data_file": WARMUP_SIZES}
    inputs = [{"key": "images", "value": images}, {"key": "sizes", "value": sizes}]
    return {"name": f"batch {batch}", "batch_size": batch, "inputs": inputs}


def _lines(values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Fields in the text format; a sequence of mappings repeats the field, one of numbers is a list."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name} {{"
            yield from _lines(value, indent + "  ")
            yield f"{indent}}}"
        elif isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
            for item in value:
                yield from _lines({name: item}, indent)
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_scalar, value))}]"
    return str(value)

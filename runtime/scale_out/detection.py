"""Detecting on more images than one process can: a session mapped over a Ray Data dataset, results as Parquet."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from asag.runtime.errors import BackendUnavailableError, one_line
from asag.runtime.files import atomic_folder, write_json
from asag.runtime.image_source import is_image, is_video
from asag.runtime.scale_out.worker import FILE_COLUMN, DetectionWorker, WorkerOptions

IMAGES_PER_TASK = 128
"""At most so many image files are one task: what is done again when a worker dies, and the rows of one output file."""


@dataclasses.dataclass(frozen=True)
class ScaleOutSummary:
    """What a run wrote: the folder, and the numbers of images that could be read, detections, and bad images."""

    output: Path
    images: int
    detections: int
    errors: int


def detect_with_ray(
    options: WorkerOptions,
    sources: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    workers: int | None = None,
    ray_address: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ScaleOutSummary:
    """Detect on images with all workers of a Ray cluster and write Parquet files into the folder ``output``.

    ``sources`` are image files and folders, searched with all folders in them, or Parquet files and folders of those.
    Each image becomes one row, in no particular order: ``id`` (absolute path, or what the Parquet source says),
    ``width`` and ``height`` in pixels, ``boxes`` (``xyxy`` in pixels of the image), ``scores``, ``labels`` (category
    ids), ``category_names``, ``overflow``, and ``error`` (null, or why the image could not be read; the rest is null
    then). ``_run.json`` beside them names the model. The folder appears when all rows are there; until then they are in
    a hidden folder beside it.

    ``workers`` is the number of sessions (None: as many as the cluster has GPUs, or CPUs for their threads).
    ``ray_address`` is that of a running cluster; None starts Ray on this machine for this run, unless the process is
    connected already. A killed worker is started again and its images are done again. ``progress`` gets (images done,
    all). The driver holds the images' names and nothing else.

    Raises ValueError for sources, options or an output that do not work, what opening the model raises, and
    BackendUnavailableError where Ray or a GPU is missing.
    """
    if ":" in options.device:
        raise ValueError(f"Ray gives each worker its GPU: name a device without a number, not {options.device}")
    if min(options.threads, 1 if workers is None else workers) < 1:
        raise ValueError(f"threads and workers must be at least 1, they are {options.threads} and {workers}")
    if not options.model.is_file():
        raise FileNotFoundError(f"model not found: {options.model}")
    options = dataclasses.replace(options, model=options.model.absolute())
    target = Path(output).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{output} is there already and not empty: name another folder, or remove it")
    images, tables = find_sources(sources)
    ray = _import_ray()
    with _connected(ray, ray_address), _quiet(ray), _plain_errors(ray):
        count = _worker_count(ray, options, workers)
        model = ray.get(ray.remote(**_resources(options))(_describe).remote(options))
        dataset, total = _image_dataset(ray, images, count) if images else _table_dataset(ray, tables, options)
        with atomic_folder(target) as folder:
            with _counting(ray, total, progress) as counter:
                dataset.map_batches(
                    DetectionWorker,
                    fn_constructor_args=(options, counter),
                    compute=ray.data.ActorPoolStrategy(size=count),
                    batch_size=None,
                    batch_format="pyarrow",
                    zero_copy_batch=True,
                    **_resources(options),
                ).write_parquet(str(folder), ray_remote_args=_FREE)
            summary = _summarize(folder, target, total)
            numbers = {"images": summary.images, "detections": summary.detections, "errors": summary.errors}
            write_json(folder / "_run.json", {"model": model, "score_threshold": options.score_threshold, **numbers})
    return summary


# Reading and writing wait for files, not for a processor. If these tasks asked for one, workers that hold all of them
# would wait for their images for ever.
_FREE = {"num_cpus": 0}


def _resources(options: WorkerOptions) -> dict[str, int]:
    return {"num_cpus": options.threads, "num_gpus": int(options.on_gpu)}


def find_sources(sources: Iterable[str | os.PathLike[str]]) -> tuple[list[str], list[str]]:
    """Absolute paths of images and of Parquet files, folders searched to the bottom; one of the two lists is empty.

    A file is an image unless it is called ``.parquet``; in folders only those with an image's suffix. Raises ValueError
    for none, for both kinds, and for videos, and FileNotFoundError for a Parquet file that is not there.
    """
    images: list[str] = []
    tables: list[str] = []
    for source in map(Path, sources):
        path = source.absolute()
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders.sort()
                files = [Path(folder, name) for name in sorted(names)]
                images += [str(file) for file in files if is_image(file)]
                tables += [str(file) for file in files if file.suffix.lower() == ".parquet"]
        elif is_video(path):
            raise ValueError(f"{source} is a video: its frames follow one another, detect without Ray")
        elif path.suffix.lower() == ".parquet":
            if not path.exists():
                raise FileNotFoundError(f"Parquet file not found: {source}")
            tables.append(str(path))
        else:
            images.append(str(path))
    if images and tables:
        raise ValueError(f"name either images or Parquet files: here are both, {images[0]} and {tables[0]}")
    if not images and not tables:
        raise ValueError("no images found, and no .parquet files")
    return images, tables


def _import_ray() -> Any:
    # Without this, Ray sends statistics of its use to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import pyarrow.dataset  # noqa: F401
        import ray
        import ray.data
    except ImportError as error:
        raise BackendUnavailableError(
            f"detecting with Ray needs Ray Data, which is not installed ({error.name}): pip install 'ray[data]'"
        ) from None
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    where: dict[str, Any] = (
        {"address": "local", "include_dashboard": False} if address is None else {"address": address}
    )
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BackendUnavailableError(f"cannot connect to Ray ({where['address']}): {one_line(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Without Ray Data's own bars and messages; errors arrive as exceptions."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    bars, announced, level = context.enable_progress_bars, context.print_on_execution_start, logger.level
    context.enable_progress_bars = context.print_on_execution_start = False
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = bars, announced
        logger.setLevel(level)


@contextlib.contextmanager
def _plain_errors(ray: Any) -> Iterator[None]:
    """What a worker raised about its input or its machine, as itself and not as Ray's report of it."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ValueError | OSError | BackendUnavailableError):
            raise cause from None
        raise


def _worker_count(ray: Any, options: WorkerOptions, workers: int | None) -> int:
    """``workers``, or as many as fit; what asks for more than the cluster has would wait for ever."""
    resources = ray.cluster_resources()
    room = int(resources.get("CPU", 0)) // options.threads
    if options.on_gpu:
        if not resources.get("GPU"):
            raise BackendUnavailableError(f"no GPU among the resources of Ray; {options.model.name} was to run on one")
        room = min(room, int(resources["GPU"]))
    if room < (workers or 1):
        raise ValueError(
            f"{workers or 1} workers of {options.threads} threads{' and a GPU' if options.on_gpu else ''} do not fit:"
            f" Ray has {resources.get('CPU', 0):.0f} CPUs and {resources.get('GPU', 0):.0f} GPUs"
        )
    return workers or room


def _describe(options: WorkerOptions) -> dict[str, str]:
    """Opened once on a worker before the images are: a model that does not work there ends the run early."""
    with options.open() as session:
        return {
            "name": session.name,
            "backend": session.backend,
            "precision": session.precision,
            "weights_digest": session.metadata.weights_digest,
        }


def _image_dataset(ray: Any, images: list[str], workers: int) -> tuple[Any, int]:
    """The names of the image files in tables of one task each, and their number.

    Workers read the files themselves. Ray's own reader would end the run at the first file that cannot be opened.
    """
    import pyarrow

    step = min(IMAGES_PER_TASK, math.ceil(len(images) / (4 * workers)))
    starts = range(0, len(images), step)
    return ray.data.from_arrow([pyarrow.table({FILE_COLUMN: images[i : i + step]}) for i in starts]), len(images)


def _table_dataset(ray: Any, tables: list[str], options: WorkerOptions) -> tuple[Any, int]:
    """The wanted columns of the Parquet files, and the number of rows; ValueError where one is not as it must be."""
    import pyarrow
    import pyarrow.dataset

    try:
        found = pyarrow.dataset.dataset(tables, format="parquet")
        total = found.count_rows()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot read the Parquet files ({tables[0]}, ...): {one_line(error)}") from None
    names = ", ".join(found.schema.names)
    for column in (options.image_column, options.id_column):
        if column is not None and column not in found.schema.names:
            raise ValueError(f"{tables[0]} has no column {column}; its columns are {names}")
    kind = found.schema.field(options.image_column).type
    fields = {field.name: field.type for field in kind} if pyarrow.types.is_struct(kind) else {"bytes": kind}
    if not _is_binary(fields.get("bytes")):
        raise ValueError(f"{tables[0]}: the column {options.image_column} is {kind}, not encoded images")
    if options.id_column is None and "path" not in fields:
        raise ValueError(f"{tables[0]}: name the column that tells its rows apart; its columns are {names}")
    columns = list(dict.fromkeys(filter(None, (options.image_column, options.id_column))))
    with _first_reader(ray):
        return ray.data.read_parquet(tables, **_FREE).select_columns(columns), total


@contextlib.contextmanager
def _first_reader(ray: Any) -> Iterator[None]:
    """With Ray Data's first reader of Parquet. Threads of the second import fsspec's HTTP module at the same time, and
    where its aiohttp is missing, which Ray does not need otherwise, one of them ends the run (Ray 2.60).
    """
    context = ray.data.DataContext.get_current()
    used, context.use_datasource_v2 = context.use_datasource_v2, False
    try:
        yield
    finally:
        context.use_datasource_v2 = used


def _is_binary(kind: Any) -> bool:
    import pyarrow

    return kind is not None and (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


class _Counter:
    """How many images are done; an actor. Images that are done again after a worker died are counted again."""

    def __init__(self) -> None:
        self._done = 0

    def add(self, images: int) -> None:
        self._done += images

    def total(self) -> int:
        return self._done


@contextlib.contextmanager
def _counting(ray: Any, total: int, progress: Callable[[int, int], None] | None) -> Iterator[Any]:
    """The handle of a counter that is shown through ``progress`` twice a second; None where nobody looks."""
    if progress is None:
        yield None
        return
    counter = ray.remote(num_cpus=0)(_Counter).remote()
    finished = threading.Event()

    def watch() -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            while not finished.wait(0.5):
                progress(min(ray.get(counter.total.remote()), total), total)

    watcher = threading.Thread(target=watch, name="ray-progress", daemon=True)
    watcher.start()
    try:
        yield counter
    finally:
        finished.set()
        watcher.join()
    progress(total, total)


def _summarize(folder: Path, target: Path, total: int) -> ScaleOutSummary:
    """Count what was written, a piece at a time; ValueError unless every image has its row."""
    import pyarrow.dataset
    from pyarrow import compute

    files = [str(file) for file in sorted(folder.glob("*.parquet"))]
    rows = detections = errors = 0
    for batch in pyarrow.dataset.dataset(files, format="parquet").to_batches(columns=["scores", "error"]):
        rows += batch.num_rows
        errors += compute.count(batch["error"]).as_py()
        detections += compute.sum(compute.list_value_length(batch["scores"])).as_py() or 0
    if rows != total:
        raise ValueError(
            f"{rows} rows were written for {total} images: is {target.parent} a folder that all nodes share?"
        )
    return ScaleOutSummary(target, rows - errors, detections, errors)

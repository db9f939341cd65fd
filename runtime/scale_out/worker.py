"""What a worker does: open a session once, then turn tables of images into results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asag.runtime.errors import one_line
from asag.runtime.image_source import SourceImage, read_images
from asag.runtime.opening import open_session
from asag.runtime.preprocessing import decode_image
from asag.runtime.session import Session, check_device

if TYPE_CHECKING:
    import pyarrow

FILE_COLUMN = "file"
"""The column of a table that names image files."""

_COUNTED_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class WorkerOptions:
    """How each worker opens ``model`` and runs it.

    ``image_column`` names the column of encoded images in Parquet files (bytes, or a struct with ``bytes``), and
    ``id_column`` what tells their rows apart (None: the ``path`` in that struct). The rest is as in
    :func:`runtime.opening.open_session` and :meth:`runtime.session.Session.detect_sources`.
    """

    model: Path
    device: str = "cpu"
    threads: int = 1
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 1
    score_threshold: float = 0.3
    image_column: str = "image"
    id_column: str | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether a worker takes a GPU."""
        return check_device(self.device)[0] != "cpu" or self.model.suffix.lower() == ".engine"

    def open(self) -> Session:
        """The session of a worker; raises ValueError too where the model does not take the batch size."""
        session = open_session(self.model, self.device, threads=self.threads, choices=self.choices)
        session.check_batch_size(self.batch_size)
        return session


class DetectionWorker:
    """Detects on the images of a table; Ray Data makes one for each actor.

    ``counter`` is the handle of an actor whose ``add`` is told how many images are done, or None.
    """

    def __init__(self, options: WorkerOptions, counter: Any) -> None:
        self._options = options
        self._counter = counter
        self._session = options.open()

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """A row of results for each image, in order; see :func:`runtime.scale_out.detection.detect_with_ray`."""
        import pyarrow

        if table.column_names == [FILE_COLUMN]:
            identities = table[FILE_COLUMN]
            sources = read_images(identities.to_pylist())
        else:
            identities, sources = _encoded_images(table, self._options)
        options, metadata = self._options, self._session.metadata
        records = []
        for source, found in self._session.detect_sources(sources, options.batch_size, options.score_threshold):
            record: dict[str, Any] = {"error": one_line(source.error)} if source.error is not None else {}
            if source.image is not None and found is not None:
                record = {
                    "width": source.image.width,
                    "height": source.image.height,
                    "boxes": found.boxes.tolist(),
                    "scores": found.scores,
                    "labels": found.labels,
                    "category_names": [metadata.category_name(label) for label in found.labels.tolist()],
                    "overflow": found.overflow,
                }
            records.append(record)
            self._count(len(records), table.num_rows)
        results = pyarrow.Table.from_pylist(records, result_schema())
        return results.add_column(0, "id", identities)

    def _count(self, done: int, total: int) -> None:
        if self._counter is not None and (done % _COUNTED_AT_ONCE == 0 or done == total):
            self._counter.add.remote((done - 1) % _COUNTED_AT_ONCE + 1)


def _encoded_images(table: pyarrow.Table, options: WorkerOptions) -> tuple[Any, Iterator[SourceImage]]:
    """The identities of the rows, and their images decoded one at a time."""
    import pyarrow
    import pyarrow.compute

    images = table[options.image_column]
    in_struct = pyarrow.types.is_struct(images.type)
    if options.id_column is not None:
        identities = table[options.id_column]
    else:
        identities = pyarrow.compute.struct_field(images, "path")
    contents = pyarrow.compute.struct_field(images, "bytes") if in_struct else images
    return identities, (_decode(*row) for row in zip(contents, identities, strict=True))


def _decode(content: pyarrow.Scalar, identity: pyarrow.Scalar) -> SourceImage:
    encoded = content.as_py()
    try:
        if encoded is None:
            raise ValueError(f"row {identity} holds no image")
        return SourceImage(None, image=decode_image(encoded, str(identity)))
    except (ValueError, OSError) as error:
        return SourceImage(None, error=error)


def result_schema() -> pyarrow.Schema:
    """Columns of the results beside ``id``, whose type is that of the source."""
    import pyarrow

    return pyarrow.schema(
        {
            "width": pyarrow.int32(),
            "height": pyarrow.int32(),
            "boxes": pyarrow.list_(pyarrow.list_(pyarrow.float32())),
            "scores": pyarrow.list_(pyarrow.float32()),
            "labels": pyarrow.list_(pyarrow.int64()),
            "category_names": pyarrow.list_(pyarrow.string()),
            "overflow": pyarrow.int32(),
            "error": pyarrow.string(),
        }
    )

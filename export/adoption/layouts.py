"""The layouts of foreign detectors: how inputs and outputs are called and shaped, and what that means.

What a file's names, ranks and last axes say is all that is looked at. Facts are of the exporters: the export scripts
and image processors of RT-DETR, D-FINE, DEIM, RF-DETR, transformers, Ultralytics and mmdeploy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx
from onnx import TensorProto

Triple = tuple[float, float, float]

UNIT: tuple[Triple, Triple] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of pixels in 0..1, red, green, blue."""

NORMALIZATIONS = {"unit": UNIT, "imagenet": IMAGENET}

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_INTEGERS = (TensorProto.INT64, TensorProto.INT32)
_UNSUPPORTED = ("mask", "keypoint")
"""What outputs are called that a detector has beside boxes, in another task."""

_MASKS = (*_FLOATS, *_INTEGERS, TensorProto.BOOL)


class UnsupportedError(ValueError):
    """A file that no layout can be named for."""


@dataclass(frozen=True)
class Port:
    """An input or output of a file; None for a side that the file leaves open."""

    name: str
    type: int
    dims: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.name} [{', '.join('?' if side is None else str(side) for side in self.dims)}]"


@dataclass(frozen=True)
class Role:
    """What an input or output is for, and how it is told from others."""

    name: str
    called: tuple[str, ...]
    """Its names; empty where exporters have many."""
    rank: int
    types: tuple[int, ...] = _FLOATS
    last: Collection[int] = ()
    """What the last axis may be; empty: anything."""
    optional: bool = False

    def fits(self, port: Port, by_name: bool) -> bool:
        """Whether a port can be this; one that the layout names must have its name, unless a person said the layout."""
        named = not by_name or not self.called or port.name in self.called
        shaped = len(port.dims) == self.rank and port.type in self.types
        return named and shaped and (not self.last or port.dims[-1] is None or port.dims[-1] in self.last)


@dataclass(frozen=True)
class Layout:
    """One kind of file. ``frame`` is what boxes are fractions of, or the pixels that they count."""

    name: str
    title: str
    inputs: tuple[Role, ...]
    outputs: tuple[Role, ...]
    boxes: Literal["cxcywh", "xyxy"]
    frame: Literal["input", "pixels"]
    ranked: bool
    """Whether outputs are detections already: a class index and a score each, best first."""
    logits: bool
    """Whether scores are to be made of logits."""
    normalization: Literal["unit", "imagenet"]
    resize: str
    interpolation: str
    more_outputs: bool = False
    """Whether other outputs may be there, which nobody then reads."""


def _image(*called: str) -> Role:
    return Role("image", called, 4)


_ROWS = Role("rows", (), 3)

_DETECTIONS = (
    Role("labels", ("labels",), 2, (*_INTEGERS, *_FLOATS)),
    Role("boxes", ("boxes",), 3, last=(4,)),
    Role("scores", ("scores",), 2),
)

LAYOUTS = (
    Layout(
        "rtdetr",
        "RT-DETR, D-FINE, DEIM",
        (_image("images"), Role("sizes", ("orig_target_sizes",), 2, (*_INTEGERS, *_FLOATS), (2,))),
        _DETECTIONS,
        boxes="xyxy",
        frame="input",
        ranked=True,
        logits=False,
        normalization="unit",
        resize="stretch",
        interpolation="antialias",
    ),
    Layout(
        "dfineseg",
        "D-FINE-seg's detectors",
        (_image(),),
        _DETECTIONS,
        boxes="xyxy",
        frame="pixels",
        ranked=True,
        logits=False,
        normalization="unit",
        resize="stretch",
        interpolation="bilinear",
    ),
    Layout(
        "transformers",
        "transformers, and others that give DETR's logits and boxes",
        (_image(), Role("mask", ("pixel_mask",), 3, _MASKS, optional=True)),
        (Role("logits", ("logits", "pred_logits"), 3), Role("boxes", ("pred_boxes", "boxes"), 3, last=(4,))),
        boxes="cxcywh",
        frame="input",
        ranked=False,
        logits=True,
        normalization="unit",
        resize="stretch",
        interpolation="antialias",
        more_outputs=True,
    ),
    Layout(
        "rfdetr",
        "RF-DETR, LW-DETR",
        (_image("input"),),
        (Role("boxes", ("dets",), 3, last=(4,)), Role("logits", ("labels",), 3)),
        boxes="cxcywh",
        frame="input",
        ranked=False,
        logits=True,
        normalization="imagenet",
        resize="stretch",
        interpolation="bilinear",
    ),
    Layout(
        "mmdeploy",
        "mmdeploy",
        (_image("input"),),
        (Role("rows", ("dets",), 3, last=(5,)), Role("labels", ("labels",), 2, _INTEGERS)),
        boxes="xyxy",
        frame="pixels",
        ranked=True,
        logits=False,
        normalization="imagenet",
        resize="fit",
        interpolation="antialias",
    ),
    Layout(
        "ultralytics",
        "Ultralytics' RT-DETR, up to 8.3",
        (_image(),),
        (_ROWS,),
        boxes="cxcywh",
        frame="input",
        ranked=False,
        logits=False,
        normalization="unit",
        resize="stretch",
        interpolation="bilinear",
    ),
    Layout(
        "ultralytics6",
        "Ultralytics' RT-DETR since 8.4",
        (_image(),),
        (Role("rows", (), 3, last=(6,)),),
        boxes="cxcywh",
        frame="input",
        ranked=True,
        logits=False,
        normalization="unit",
        resize="stretch",
        interpolation="bilinear",
    ),
)

LAYOUT_NAMES = tuple(layout.name for layout in LAYOUTS)


@dataclass(frozen=True)
class Interface:
    """A file's inputs and outputs by the roles that they have in its layout."""

    layout: Layout
    inputs: dict[str, Port]
    outputs: dict[str, Port]

    @property
    def image(self) -> Port:
        """[B, 3, H, W]"""
        return self.inputs["image"]

    @property
    def batch(self) -> int | None:
        """The fixed batch size, or None."""
        return self.image.dims[0]

    @property
    def has_mask(self) -> bool:
        """Whether the file is told where the content is."""
        return "mask" in self.inputs

    @property
    def normalization(self) -> str:
        """Files with a mask are of DETR's kin, which wants ImageNet's; RT-DETR and its kin, which take none, do not."""
        return "imagenet" if self.has_mask else self.layout.normalization

    @property
    def resize(self) -> str:
        """As above."""
        return "fit" if self.has_mask else self.layout.resize

    @property
    def columns(self) -> int | None:
        """How many classes the outputs tell apart; None where they do not say."""
        if self.layout.ranked:
            return None
        if self.layout.logits:
            return self.outputs["logits"].dims[-1]
        last = self.outputs["rows"].dims[-1]
        return None if last is None else last - 4


def ports(values: Iterable[onnx.ValueInfoProto]) -> tuple[Port, ...]:
    """Inputs or outputs of a graph."""
    found = []
    for value in values:
        tensor = value.type.tensor_type
        dims = tuple(side.dim_value if side.HasField("dim_value") else None for side in tensor.shape.dim)
        found.append(Port(value.name, tensor.elem_type, dims))
    return tuple(found)


def graph_inputs(graph: onnx.GraphProto) -> tuple[Port, ...]:
    """What a graph is fed; old exporters list weights among the inputs, too."""
    weights = {tensor.name for tensor in graph.initializer}
    return ports(value for value in graph.input if value.name not in weights)


def recognise(inputs: Sequence[Port], outputs: Sequence[Port], name: str | None = None) -> Interface:
    """The layout of a file with these inputs and outputs; with `name`, that one, whatever its inputs are called.

    Raises ValueError where they are no known layout or two, where the named one does not fit, and UnsupportedError for
    the outputs of other tasks and for other images.
    """
    for task in _UNSUPPORTED:
        found = [port.name for port in outputs if task in port.name.lower()]
        if found:
            raise UnsupportedError(
                f"{task}s are not supported, and {found[0]} has them; export a detector of boxes alone"
            )
    images = [port for port in inputs if len(port.dims) == 4]
    if len(images) == 1 and images[0].dims[1] not in (None, 3):
        raise UnsupportedError(f"inputs {images[0]} are no known layout: images are [B, 3, H, W]; export it for those")
    if name is not None:
        layout = next(layout for layout in LAYOUTS if layout.name == name)
        assigned = _assign(layout, inputs, outputs, by_name=False)
        if assigned is None:
            raise ValueError(f"{_described(inputs, outputs)} are not those of layout {name}")
        return assigned
    assigned_ones = (_assign(layout, inputs, outputs, by_name=True) for layout in LAYOUTS)
    fitting = [assigned for assigned in assigned_ones if assigned is not None]
    if not fitting:
        raise ValueError(f"{_described(inputs, outputs)} are no known layout; name one with --layout")
    if fitting[0].layout.name == "ultralytics" and len(fitting) > 1:
        if fitting[0].columns is None:
            raise ValueError(f"{fitting[0].outputs['rows']} leaves its columns open; adoption runs it and sees them")
        raise ValueError(
            "six columns are a score and a class, or two classes; choose --layout ultralytics6 (Ultralytics since 8.4)"
            " or --layout ultralytics"
        )
    return fitting[0]


def _assign(layout: Layout, inputs: Sequence[Port], outputs: Sequence[Port], by_name: bool) -> Interface | None:
    """Inputs and outputs in the layout's roles, or None where they do not fit."""
    given = _roles(layout.inputs, inputs, by_name)
    made = _roles(layout.outputs, outputs, by_name)
    if given is None or made is None or len(given) < len(inputs):
        return None
    if len(made) < len(outputs) and not layout.more_outputs:
        return None
    if given["image"].dims[1] not in (None, 3):
        return None
    rows = made.get("rows")
    if layout.name == "ultralytics" and rows is not None and rows.dims[-1] is not None and rows.dims[-1] < 5:
        return None
    return Interface(layout, given, made)


def _roles(roles: Sequence[Role], found: Sequence[Port], by_name: bool) -> dict[str, Port] | None:
    assigned: dict[str, Port] = {}
    for role in roles:
        free = [port for port in found if port not in assigned.values()]
        fitting = [port for port in free if role.fits(port, by_name)]
        # A name that the layout has goes before one that fits as well.
        fitting.sort(key=lambda port: port.name not in role.called)
        if fitting:
            assigned[role.name] = fitting[0]
        elif not role.optional:
            return None
    return assigned


def _described(inputs: Sequence[Port], outputs: Sequence[Port]) -> str:
    given, made = (", ".join(map(str, side)) for side in (inputs, outputs))
    return f"inputs {given} and outputs {made}"

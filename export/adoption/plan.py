"""What a file does not say, and a person may: how pixels get in, what scores mean, which classes there are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from asag.datasets import COCO_CATEGORIES
from asag.export.adoption.layouts import NORMALIZATIONS, Interface, Port, Triple
from asag.export.adoption.self_description import SelfDescription
from asag.runtime.coco_file import read_coco_file

COCO_SETS = ("coco80", "coco91")
"""COCO's 80 categories in the order of their ids, or with their ids as columns, 11 of which are no category."""

NO_CLASS = "N/A"
"""In a list of names, of a column that is no class, such as the last one of RF-DETR."""

LIKELY_SETS = {80: "coco80", 91: "coco91"}
"""By the number of columns of a head."""


@dataclass(frozen=True)
class AdoptionOptions:
    """What a person says; None where the layout decides. ``images`` are photographs to verify with."""

    layout: str | None = None
    input_size: tuple[int, int] | None = None
    resize: str | None = None
    interpolation: str | None = None
    normalization: str | None = None
    mean: Triple | None = None
    std: Triple | None = None
    bgr: bool = False
    activation: str | None = None
    classes: str | None = None
    images: Path | None = None
    keep_grid_sample: bool = False
    strict: bool = False


@dataclass(frozen=True)
class Classes:
    """What the columns of a head, or the class indices of ranked detections, mean.

    ``columns`` has the category id of each, None where it is no category.
    """

    columns: tuple[int | None, ...]
    names: dict[int, str]

    @property
    def ids(self) -> tuple[int, ...]:
        """Of the columns that are categories, in their order."""
        return tuple(number for number in self.columns if number is not None)

    @property
    def used(self) -> tuple[int, ...]:
        """Which columns are categories."""
        return tuple(place for place, number in enumerate(self.columns) if number is not None)


@dataclass(frozen=True)
class Plan:
    """All that decides the adapters; mean and std are of pixels in 0..1, ``assumed`` are lines for a person."""

    interface: Interface
    size: tuple[int, int]
    resize: str
    interpolation: str
    mean: Triple
    std: Triple
    bgr: bool
    softmax: bool
    classes: Classes
    assumed: tuple[str, ...] = field(default=(), compare=False)


def input_size(image: Port, wanted: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of the input image [B, 3, H, W]; ValueError where nobody says them, or the file says others."""
    fixed = image.dims[2:]
    if wanted is None:
        height, width = fixed
        if height is None or width is None:
            raise ValueError("height and width are not fixed; give --input-size HxW")
        return height, width
    if any(side not in (None, other) for side, other in zip(fixed, wanted, strict=True)):
        raise ValueError(f"the input is {fixed[0]}x{fixed[1]} and cannot be {wanted[0]}x{wanted[1]}; export it again")
    return wanted


def make_plan(
    interface: Interface, size: tuple[int, int], options: AdoptionOptions, said: SelfDescription, head: int | None
) -> Plan:
    """The options where they are given, else what the file says, else what the layout's exporters do, which is noted.

    head: how many classes the head seems to tell apart, for a hint where ranked detections do not say.

    Raises ValueError where a choice does not fit the layout or the classes do not fit the head.
    """
    assumed = []

    def chosen(given: str | None, default: str, option: str, text: str) -> str:
        if given is None:
            assumed.append(f"{text}; {option} changes it")
        return given or default

    resize = chosen(options.resize, interface.resize, "--resize", _RESIZES[interface.resize])
    interpolation = chosen(
        options.interpolation,
        interface.layout.interpolation,
        "--interpolation",
        _INTERPOLATIONS[interface.layout.interpolation],
    )
    softmax = _softmax(interface, options, assumed)
    mean, std = _normalization("imagenet" if softmax else interface.normalization, options, said, assumed)
    if not options.bgr:
        assumed.append("channels are red, green, blue; --bgr turns them round")
    columns = interface.columns
    if columns is not None and softmax:
        columns -= 1
    classes = _classes(options.classes, said, columns, head, assumed)
    return Plan(interface, size, resize, interpolation, mean, std, options.bgr, softmax, classes, tuple(assumed))


def _classes(
    wanted: str | None, said: SelfDescription, columns: int | None, head: int | None, assumed: list[str]
) -> Classes:
    if wanted is None and said.classes is not None and (columns is None or columns == len(said.classes)):
        assumed.append(f"classes are the {len(said.classes)} that the file names; --classes changes them")
        return Classes(tuple(said.classes), dict(said.classes))
    if wanted is None and columns is None:
        likely = f" ({head} of them{_likely(head)})" if head else ""
        raise ValueError(f"ranked detections do not tell the classes; give --classes{likely}")
    classes = read_classes(wanted, columns)
    if wanted is None:
        count = len(classes.columns)
        assumed.append(f"classes are called 0..{count - 1}; --classes names them{_likely(count)}")
    elif len(classes.used) < len(classes.columns):
        left = len(classes.columns) - len(classes.used)
        assumed.append(f"{left} of {len(classes.columns)} columns are no class of {wanted} and left out")
    return classes


_RESIZES = {
    "stretch": "images are stretched to the whole input",
    "fit": "images keep their aspect, at the top left, zeros around them after normalizing",
}
_INTERPOLATIONS = {
    "antialias": "images are resized with PIL's bilinear filter",
    "bilinear": "images are resized bilinearly, without a filter when shrinking",
}


def _normalization(
    usual: str, options: AdoptionOptions, said: SelfDescription, assumed: list[str]
) -> tuple[Triple, Triple]:
    """usual: the name of what the layout's exporters do; DETR, which alone has a softmax, wants ImageNet's."""
    if (options.mean is None) != (options.std is None):
        raise ValueError("--mean and --std belong together; give both")
    if options.mean is not None and options.std is not None:
        if options.normalization is not None:
            raise ValueError("--normalization and --mean with --std exclude each other; give one")
        return options.mean, options.std
    name = options.normalization
    if name is None and said.normalization is not None:
        mean, std = said.normalization
        assumed.append(f"RGB/255, then mean {mean} and standard deviation {std}, as the file says; --mean changes it")
        return mean, std
    if name is None:
        name = usual
        what = "RGB/255" if name == "unit" else "RGB/255, then ImageNet's mean and standard deviation"
        assumed.append(f"{what}; --normalization changes it")
    return NORMALIZATIONS[name]


def _softmax(interface: Interface, options: AdoptionOptions, assumed: list[str]) -> bool:
    if not interface.layout.logits:
        if options.activation is not None:
            raise ValueError(f"layout {interface.layout.name} has scores already; leave --activation out")
        return False
    if options.activation is None:
        assumed.append("logits are for a sigmoid; --activation softmax where the last class means none (DETR)")
    return options.activation == "softmax"


def read_classes(wanted: str | None, columns: int | None) -> Classes:
    """The classes of a head of so many columns; None where ranked detections do not tell how many there are.

    wanted: "coco80", "coco91", or a file: COCO's annotations, or a name per line, N/A where a column is no class.
    Classes are the columns in their order where there are as many, else the columns that their ids count. Raises
    ValueError where neither fits.
    """
    if wanted is None:
        assert columns is not None, "ranked detections need classes"
        return Classes(tuple(range(columns)), {number: str(number) for number in range(columns)})
    names = COCO_CATEGORIES if wanted in COCO_SETS else _read_names(Path(wanted))
    unused = {number for number, name in names.items() if name == NO_CLASS}
    if unused and columns in (None, len(names)):
        named = {number: name for number, name in names.items() if number not in unused}
        return Classes(tuple(number if number in named else None for number in names), named)
    by_id = tuple(number if number in names else None for number in range(max(names) + 1))
    if wanted == "coco91":
        by_id = (*by_id, *[None] * (91 - len(by_id)))
    elif columns is None or columns == len(names):
        return Classes(tuple(names), dict(names))
    if columns is None or (wanted != "coco80" and None in by_id and columns >= len(by_id)):
        return Classes((*by_id, *[None] * ((columns or len(by_id)) - len(by_id))), dict(names))
    remedy = _likely(columns)
    if columns == len(names) + 1 and not remedy:
        remedy = f"; where the last column means none, give --activation softmax for DETR, or add a line {NO_CLASS}"
    raise ValueError(f"the head tells {columns} classes apart, and {wanted} has {len(names)}{remedy}")


def _likely(columns: int) -> str:
    """A hint at the classes that a head of so many columns usually has."""
    return f"; likely --classes {LIKELY_SETS[columns]}" if columns in LIKELY_SETS else ""


def _read_names(path: Path) -> dict[int, str]:
    """Category ids and names of a file, in their order."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file of classes: {path}; or say {' or '.join(COCO_SETS)}")
    if path.suffix.lower() == ".json":
        categories = read_coco_file(path).categories
        if all(str(category.id).isdecimal() for category in categories):
            return {int(category.id): category.name for category in categories}
        return {number: category.name for number, category in enumerate(categories)}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8; write a class name per line") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path} names no classes; write one per line")
    return dict(enumerate(names))

"""Pictures of the method on one image: patches, anchors, dynamic proposals, detections."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from runtime.drawing import Colour, caption_font, class_colour, draw_detections
from runtime.metadata import ModelMetadata
from runtime.postprocessing import Detections, postprocess

PATCH_CELLS = 15
"""Cells along each side of a patch (specification section 3)."""

PROBED_STRIDES = {"P4": 16, "P3": 8}
"""Input pixels per cell of the levels that are explored patch by patch."""

PATCH_COLOUR: Colour = (255, 40, 40)
ANCHOR_COLOUR: Colour = (255, 255, 255)

_PANEL_SIDE = 480
_NARROWEST_PANEL = 300
_GAP = 8
_BACKGROUND: Colour = (24, 26, 30)
_CAPTION_COLOUR: Colour = (235, 235, 235)


@dataclasses.dataclass(frozen=True)
class Stages:
    """What the method did on one image; boxes are ``xyxy`` in pixels of the original image.

    ``patches``: per explored level ("P4", then "P3"; absent where exploring stopped before) the patches [N, 4].
    ``anchors`` [N, 4] are the sparse anchors that became queries, ``proposals`` the same queries as dynamic proposals,
    each with its best class, and ``detections`` the result.
    """

    patches: dict[str, NDArray[np.float32]]
    anchors: NDArray[np.float32]
    proposals: Detections
    detections: Detections


@dataclasses.dataclass(frozen=True)
class Panel:
    """One drawn stage with its caption."""

    picture: Image.Image
    caption: str


def read_stages(tensors: Mapping[str, NDArray], metadata: ModelMetadata, image_size: tuple[int, int]) -> Stages:
    """Stages of one image from the tensors of ``asag.deploy.DeployedDetector.stages`` for a batch of one.

    Needs ``sizes`` [1, 2] (height, width of the content in input pixels) besides them; ``image_size`` is the original
    (height, width) in pixels.
    """
    height, width = image_size
    content_height, content_width = (float(value) for value in tensors["sizes"][0])
    to_image = np.array([width / content_width, height / content_height] * 2, np.float32)
    patches = {}
    for level, stride in PROBED_STRIDES.items():
        corners = tensors.get(f"{level.lower()}_crop_xy")
        if corners is not None:
            first = corners.astype(np.float32) * stride
            patches[level] = np.concatenate((first, first + PATCH_CELLS * stride), axis=1) * to_image
    valid = tensors["valid"][0]
    logits = tensors["proposal_logits"][0][valid].astype(np.float64)
    boxes = _corners(tensors["proposal_boxes"][0][valid]) * np.array([width, height] * 2, np.float32)
    best = logits.argmax(axis=1)
    scores = (1 / (1 + np.exp(-logits.max(axis=1)))).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    overflow = int(tensors["overflow"][0])
    labels = np.asarray(metadata.category_ids, np.int64)[best]
    (detections,) = postprocess(tensors, [image_size], metadata)
    return Stages(
        patches=patches,
        anchors=_corners(tensors["anchors"][0][valid]) * to_image,
        proposals=Detections(boxes[order], scores[order], labels[order], overflow, image_size),
        detections=detections,
    )


def read_stage_values(values: Mapping[str, NDArray], metadata: ModelMetadata, image_size: tuple[int, int]) -> Stages:
    """Stages of one image from the values of :mod:`runtime.onnx_stages` and ``sizes``; without proposals.

    An exported file does not compute the proposals' classes, which only training needs.
    """
    found = dict(values)
    for level in PROBED_STRIDES:
        name = level.lower()
        if f"{name}_corners" in values:
            found[f"{name}_crop_xy"] = values[f"{name}_corners"][0][values[f"{name}_valid"][0]]
    batch, queries = values["anchors"].shape[:2]
    found["proposal_logits"] = np.zeros((batch, queries, len(metadata.category_ids)), np.float32)
    found["proposal_boxes"] = np.zeros((batch, queries, 4), np.float32)
    stages = read_stages(found, metadata, image_size)
    return dataclasses.replace(stages, proposals=stages.proposals.select(np.zeros(0, np.int64)))


def stage_panels(
    image: Image.Image, stages: Stages, metadata: ModelMetadata, score_threshold: float = 0.3, side: int = _PANEL_SIDE
) -> list[Panel]:
    """The four stages drawn on copies of ``image`` whose longer side is ``side`` pixels.

    Patches are red, those of P4 with the thicker line, anchors white; both on a darkened image. Proposals and
    detections that score at least ``score_threshold`` are coloured by class.
    """
    scale = side / max(image.size)
    shown = image.convert("RGB").resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BILINEAR
    )
    dark = Image.blend(shown, Image.new("RGB", shown.size), 0.45)
    factors = np.array([shown.width / image.width, shown.height / image.height] * 2)

    patches = dark.copy()
    for level, width in (("P3", 1), ("P4", 3)):
        _outline(patches, stages.patches.get(level, _NOTHING) * factors, [PATCH_COLOUR], width)
    anchors = dark.copy()
    _outline(anchors, stages.anchors * factors, [ANCHOR_COLOUR], 1)
    proposals = shown.copy()
    confident = stages.proposals.above(score_threshold)
    colours = [_colour(int(label), metadata) for label in confident.labels]
    _outline(proposals, confident.boxes[::-1] * factors, colours[::-1], 2)
    detections = draw_detections(shown, stages.detections, metadata, score_threshold)

    found = len(stages.detections.above(score_threshold))
    return [
        Panel(patches, _patch_caption(stages)),
        Panel(anchors, _count(len(stages.anchors), "sparse anchor")),
        Panel(
            proposals,
            f"Dynamic proposals: {len(confident)} of {len(stages.proposals)} score at least {score_threshold:g}",
        ),
        Panel(detections, f"{_count(found, 'final box', 'final boxes')} scoring at least {score_threshold:g}"),
    ]


def draw_stages(
    image: Image.Image, stages: Stages, metadata: ModelMetadata, score_threshold: float = 0.3
) -> Image.Image:
    """One picture of the four stages side by side, captions above and the classes' colours below."""
    panels = stage_panels(image, stages, metadata, score_threshold)
    font = caption_font(16)
    column = max(_NARROWEST_PANEL, panels[0].picture.width)
    captions = ["\n".join(_wrapped(panel.caption, font, column)) for panel in panels]
    above = 22 * max(caption.count("\n") + 1 for caption in captions) + _GAP
    below = 22 + 2 * _GAP
    height = max(40, panels[0].picture.height)
    width = len(panels) * (column + _GAP) + _GAP
    canvas = Image.new("RGB", (width, above + height + below), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for index, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left = _GAP + index * (column + _GAP)
        draw.multiline_text((left, _GAP // 2), caption, fill=_CAPTION_COLOUR, font=font, spacing=4)
        canvas.paste(panel.picture, (left, above))
    _draw_legend(draw, stages, metadata, score_threshold, (above + height + _GAP, width))
    return canvas


_NOTHING = np.zeros((0, 4), np.float32)


def _corners(boxes: NDArray) -> NDArray[np.float32]:
    """``cxcywh`` [N, 4] -> ``xyxy`` [N, 4]."""
    half = boxes[:, 2:] / 2
    return np.concatenate((boxes[:, :2] - half, boxes[:, :2] + half), axis=1).astype(np.float32)


def _colour(label: int, metadata: ModelMetadata) -> Colour:
    return class_colour(metadata.category_ids.index(label))


def _outline(canvas: Image.Image, boxes: NDArray, colours: Sequence[Colour], width: int) -> None:
    """Draw boxes [N, 4], clipped to the canvas; one colour for all, or one for each."""
    draw = ImageDraw.Draw(canvas)
    limit = np.array([canvas.width - 1, canvas.height - 1] * 2)
    for index, box in enumerate(boxes):
        if not np.isfinite(box).all():
            continue
        left, top, right, bottom = (float(value) for value in np.clip(box, 0, limit))
        draw.rectangle((left, top, right, bottom), outline=colours[index % len(colours)], width=width)


def _patch_caption(stages: Stages) -> str:
    ends = {"P4": " (thick)", "P3": ""}
    counts = [f"{len(patches)} on {level}{ends[level]}" for level, patches in stages.patches.items() if len(patches)]
    return f"Patches explored: {', '.join(counts)}" if counts else "No patches: nothing asked for a closer look"


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def _wrapped(text: str, font: object, width: int) -> list[str]:
    """Lines of whole words that fit ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _text_width(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _text_width(text: str, font: object) -> float:
    return float(font.getlength(text))  # type: ignore[attr-defined]


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    stages: Stages,
    metadata: ModelMetadata,
    score_threshold: float,
    place: tuple[int, int],
) -> None:
    """A swatch and the name of every class that is drawn, the most frequent first, as far as the row reaches."""
    top, width = place
    font = caption_font(16)
    labels = np.concatenate([kind.above(score_threshold).labels for kind in (stages.proposals, stages.detections)])
    found, counts = np.unique(labels, return_counts=True)
    left = _GAP
    for label in found[np.argsort(-counts, kind="stable")]:
        name = metadata.category_name(int(label))
        right = left + 24 + _text_width(name, font)
        if right > width - _GAP:
            draw.text((left, top), "...", fill=_CAPTION_COLOUR, font=font)
            break
        draw.rectangle((left, top + 3, left + 16, top + 17), fill=_colour(int(label), metadata))
        draw.text((left + 22, top), name, fill=_CAPTION_COLOUR, font=font)
        left = int(right) + 20

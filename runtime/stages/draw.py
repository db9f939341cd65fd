"""Pictures of a forward pass on one image: what its stages name, by kind, and its detections.

A part of the network is drawn once for its places (what was looked at more closely), and then for the boxes of each
stage whose rows last to the end of the part, coloured by class where the stage has scores. Where a stage has points,
those of the best detections are dots on its boxes; where it has Gaussians, those of the best one are a heat map.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from asag.family import Stage, Value
from asag.runtime.captions import caption, plain_font
from asag.runtime.drawing import Colour, class_colour, draw_detections
from asag.runtime.metadata import ModelMetadata
from asag.runtime.postprocessing import Detections
from asag.runtime.stages.heat_map import draw_heat_map

PLACE_COLOUR: Colour = (255, 40, 40)
BOX_COLOUR: Colour = (255, 255, 255)
OTHER_COLOUR: Colour = (150, 150, 150)
"""Of boxes beside those whose points are drawn."""

DETECTIONS_WITH_POINTS = 4
"""More at a time hide one another."""

_PANEL_SIDE = 480
_NARROWEST_PANEL = 300
_PANELS_IN_A_ROW = 5
_GAP = 8
_BACKGROUND: Colour = (24, 26, 30)
_CAPTION_COLOUR: Colour = (235, 235, 235)


@dataclasses.dataclass(frozen=True)
class SeenStages:
    """What one run of one image named: the values by name, for a batch of one, with the model's input ``sizes``.

    ``detections`` are those of the same run, in pixels of the original image.
    """

    values: Mapping[str, NDArray]
    detections: Detections
    metadata: ModelMetadata


@dataclasses.dataclass(frozen=True)
class Panel:
    """One drawn step with its caption."""

    picture: Image.Image
    caption: str


@dataclasses.dataclass(frozen=True)
class _Boxes:
    """Boxes `xyxy` [N, 4] in pixels of the original image; with a label and a score each, where there are some."""

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64] | None = None
    scores: NDArray[np.float64] | None = None


@dataclasses.dataclass(frozen=True)
class _Points:
    """Points [N, P, 2] in pixels of the original image, and the binary logarithms [N, P] of how many of the input's
    pixels each spans.
    """

    places: NDArray[np.float64]
    spans: NDArray[np.float64] | None


def stage_panels(image: Image.Image, seen: SeenStages, score_threshold: float) -> list[Panel]:
    """The stages of a run drawn on copies of ``image``, and in the end its detections.

    Places are red, the coarsest with the thickest line, boxes without classes white; both on a darkened image. What
    scores at least ``score_threshold`` is coloured by class. The last stage is what the detections are chosen from; it
    is drawn where it has points, or where the stage before it has some and no boxes. Each detection whose points are
    drawn has a colour of its own, and a dot is the larger the coarser the query looks there.
    """
    scale = _PANEL_SIDE / max(image.size)
    shown = image.convert("RGB").resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BILINEAR
    )
    dark = Image.blend(shown, Image.new("RGB", shown.size), 0.45)
    factors = np.array([shown.width / image.width, shown.height / image.height] * 2)
    reader = _Reader(seen)
    panels = []
    best = reader.best_rows(seen.metadata.stages, score_threshold)
    for stages in _by_part(seen.metadata.stages):
        places = [(stage.title, where) for stage in stages if (where := reader.places(stage)) is not None]
        if places:
            picture = dark.copy()
            for thickness, (_, where) in enumerate(reversed(places)):
                _outline(picture, where * factors, [PLACE_COLOUR], 1 + 2 * thickness)
            panels.append(Panel(picture, ", ".join(f"{title}: {len(where)}" for title, where in places)))
        for stage in _with_lasting_rows(stages):
            gaussians = reader.gaussians(stage)
            if gaussians is not None and len(best):
                panels.append(_heat_panel(stage.title, gaussians[best[0]], shown, factors[:2]))
            boxes, points = reader.boxes(stage), reader.points(stage)
            if points is None and stage is seen.metadata.stages[-1]:
                points = reader.points_before(stage)
            if boxes is not None and points is not None and len(boxes.boxes) == len(points.places):
                panels.append(_point_panel(stage.title, boxes, points, best, dark, factors))
            elif boxes is not None and stage is not seen.metadata.stages[-1]:
                panels.append(_box_panel(stage.title, boxes, shown, dark, factors, score_threshold))
    count = len(seen.detections.above(score_threshold))
    caption = f"detections: {count} of {len(seen.detections)} score at least {score_threshold:g}"
    return [*panels, Panel(draw_detections(shown, seen.detections, seen.metadata, score_threshold), caption)]


def _by_part(stages: Sequence[Stage]) -> list[list[Stage]]:
    parts: dict[str, list[Stage]] = {}
    for stage in stages:
        parts.setdefault(stage.timed_as, []).append(stage)
    return list(parts.values())


def _with_lasting_rows(stages: Sequence[Stage]) -> Sequence[Stage]:
    """The stages of a part but those out of whose rows a later one of it chooses."""
    choosing = [number for number, stage in enumerate(stages) if stage.aligns]
    return stages[choosing[-1] :] if choosing else stages


def _point_panel(
    title: str,
    found: _Boxes,
    points: _Points,
    best: NDArray[np.int64],
    dark: Image.Image,
    factors: NDArray[np.float64],
) -> Panel:
    """Boxes, and the points of those rows of them that are the best detections; the best on top."""
    picture = dark.copy()
    boxes = found.boxes * factors
    best = best[best < len(boxes)]
    _outline(picture, np.delete(boxes, best, axis=0), [OTHER_COLOUR], 1)
    draw = ImageDraw.Draw(picture)
    if points.places.shape[1] == 1:  # the queries' own places, not where they look
        for x, y in np.delete(points.places[:, 0], best, axis=0) * factors[:2]:
            if np.isfinite((x, y)).all():
                draw.circle((x, y), 1.5, fill=BOX_COLOUR)
    for rank in reversed(range(len(best))):
        row, colour = best[rank], class_colour(rank)
        _outline(picture, boxes[row : row + 1], [colour], 3)
        spans = np.full(points.places.shape[1], 3.0) if points.spans is None else points.spans[row]
        for place in np.argsort(-spans, kind="stable"):
            x, y = points.places[row, place] * factors[:2]
            if np.isfinite((x, y, spans[place])).all():
                draw.circle((x, y), float(np.clip(spans[place] - 1, 1, 5)), fill=colour, outline="black")
    looking = f"; where the best {len(best)} look, in a colour each" if len(best) else ""
    return Panel(picture, f"{title}: {len(boxes)}{looking}")


def _heat_panel(title: str, gaussians: NDArray[np.float64], shown: Image.Image, factors: NDArray[np.float64]) -> Panel:
    """gaussians: [H, 4] of one query, pixels of the original image."""
    scaled = np.concatenate((gaussians[:, :2] * factors, gaussians[:, 2:] / factors), axis=1)
    return Panel(draw_heat_map(shown, scaled), f"{title}: where the best detection looks, {len(gaussians)} heads")


def _box_panel(
    title: str,
    found: _Boxes,
    shown: Image.Image,
    dark: Image.Image,
    factors: NDArray[np.float64],
    score_threshold: float,
) -> Panel:
    if found.scores is None or found.labels is None:
        picture = dark.copy()
        _outline(picture, found.boxes * factors, [BOX_COLOUR], 1)
        return Panel(picture, f"{title}: {len(found.boxes)}")
    order = np.argsort(found.scores, kind="stable")  # the most confident on top
    order = order[found.scores[order] >= score_threshold]
    picture = shown.copy()
    colours = [class_colour(int(found.labels[index])) for index in order]
    _outline(picture, found.boxes[order] * factors, colours, 2)
    return Panel(picture, f"{title}: {len(order)} of {len(found.boxes)} score at least {score_threshold:g}")


class _Reader:
    """Values of a run as boxes of the original image, row by row as far as the rows exist."""

    def __init__(self, seen: SeenStages) -> None:
        height, width = seen.detections.image_size
        content_height, content_width = (float(value) for value in seen.values["sizes"][0])
        self._values = seen.values
        self._scale = {
            "input": np.array([width / content_width, height / content_height] * 2),
            "content": np.array([width, height] * 2, np.float64),
        }
        self._stages, self._input_size = seen.metadata.stages, seen.metadata.input_size
        self._scale["padded"] = self._scale["input"] * (*self._input_size[::-1], *self._input_size[::-1])
        self._valid: dict[str, NDArray | None] = {}
        latest = None
        for stage in seen.metadata.stages:
            _, valid = self._value(stage, "valid")
            latest = latest if valid is None else valid.astype(bool)
            self._valid[stage.name] = latest

    def places(self, stage: Stage) -> NDArray[np.float64] | None:
        """The squares [N, 4] that a stage cut out, or its cells, `xyxy`; None where it has neither."""
        _, numbers = self._value(stage, "cells")
        if numbers is not None:
            return self._cells()[self._existing(stage, numbers)] * self._scale["input"]
        value, corners = self._value(stage, "places")
        if value is None or corners is None:
            return None
        pixels, cells = value.cell
        first = self._existing(stage, corners).astype(np.float64) * pixels
        return np.concatenate((first, first + pixels * cells), axis=1) * self._scale["input"]

    def _cells(self) -> NDArray[np.float64]:
        """All cells of the features' maps, `xyxy` [T, 4] in pixels of the input, in the order of their numbers."""
        parts = []
        for name in self._stages[0].value_names():
            height, width = self._values[name].shape[-2:]
            side = np.array([self._input_size[1] / width, self._input_size[0] / height])
            corners = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).reshape(-1, 2) * side
            parts.append(np.concatenate((corners, corners + side), axis=1))
        return np.concatenate(parts)

    def boxes(self, stage: Stage) -> _Boxes | None:
        """The boxes of a stage, with the best class of each where it has scores; None where it has none."""
        value, boxes = self._value(stage, "boxes")
        if value is None or boxes is None:
            return None
        boxes = self._existing(stage, boxes)[:, :4].astype(np.float64)
        half = boxes[:, 2:] / 2
        corners = np.concatenate((boxes[:, :2] - half, boxes[:, :2] + half), axis=1) * self._scale[value.frame]
        _, logits = self._value(stage, "scores")
        if logits is None:
            return _Boxes(corners)
        logits = self._existing(stage, logits).astype(np.float64)
        return _Boxes(corners, logits.argmax(axis=1), 1 / (1 + np.exp(-logits.max(axis=1, initial=-np.inf))))

    def points(self, stage: Stage) -> _Points | None:
        """Where the queries of a stage look; None where it does not say."""
        value, points = self._value(stage, "points")
        if value is None or points is None:
            return None
        points = self._existing(stage, points).astype(np.float64)
        points = points.reshape(len(points), -1, points.shape[-1])
        places = points[..., :2] * value.unit * self._scale[value.frame][:2]
        return _Points(places, points[..., 2] + np.log2(value.unit) if points.shape[-1] > 2 else None)

    def points_before(self, stage: Stage) -> _Points | None:
        """Where the queries looked in the stage before, if they had no boxes there."""
        stages = self._stages[: self._stages.index(stage)]
        return self.points(stages[-1]) if stages and self.boxes(stages[-1]) is None else None

    def gaussians(self, stage: Stage) -> NDArray[np.float64] | None:
        """Those of a stage's rows, [N, H, 4], in pixels of the original image; None where it has none."""
        _, gaussians = self._value(stage, "gaussians")
        if gaussians is None:
            return None
        scale = self._scale["input"][:2]
        gaussians = self._existing(stage, gaussians).astype(np.float64)
        gaussians = gaussians.reshape(len(gaussians), -1, 4)
        return np.concatenate((gaussians[..., :2] * scale, gaussians[..., 2:] / scale), axis=-1)

    def best_rows(self, stages: Sequence[Stage], score_threshold: float) -> NDArray[np.int64]:
        """Rows of the last stage that score the most, at least ``score_threshold``, the best first."""
        last = self.boxes(stages[-1]) if stages else None
        if last is None or last.scores is None:
            return np.zeros(0, np.int64)
        order = np.argsort(-last.scores, kind="stable")[:DETECTIONS_WITH_POINTS]
        return order[last.scores[order] >= score_threshold]

    def _value(self, stage: Stage, kind: str) -> tuple[Value, NDArray] | tuple[None, None]:
        for value in stage.values:
            if value.kind == kind and (name := f"{stage.name}/{value.name}") in self._values:
                return value, self._values[name][0]
        return None, None

    def _existing(self, stage: Stage, rows: NDArray) -> NDArray:
        """The rows that exist, by this stage's word or that of the last before it, if it spoke of as many."""
        valid = self._valid.get(stage.name)
        return rows if valid is None or len(valid) != len(rows) else rows[valid]


def draw_stages(image: Image.Image, seen: SeenStages, score_threshold: float) -> Image.Image:
    """One picture of the stages side by side, in rows, captions above and the classes' colours below."""
    panels = stage_panels(image, seen, score_threshold)
    font = plain_font(16)
    column = max(_NARROWEST_PANEL, panels[0].picture.width)
    captions = ["\n".join(_wrapped(panel.caption, font, column)) for panel in panels]
    above = 22 * max(text.count("\n") + 1 for text in captions) + _GAP
    below = 22 + 2 * _GAP
    rows = -(-len(panels) // _PANELS_IN_A_ROW)
    columns = -(-len(panels) // rows)
    row_height = above + max(40, panels[0].picture.height)
    width = columns * (column + _GAP) + _GAP
    canvas = Image.new("RGB", (width, rows * row_height + below), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for index, (panel, text) in enumerate(zip(panels, captions, strict=True)):
        left, top = _GAP + index % columns * (column + _GAP), index // columns * row_height
        draw.multiline_text((left, top + _GAP // 2), text, fill=_CAPTION_COLOUR, font=font, spacing=4)
        canvas.paste(panel.picture, (left, top + above))
    _draw_legend(draw, seen, score_threshold, (rows * row_height + _GAP, width))
    return canvas


def _outline(canvas: Image.Image, boxes: NDArray, colours: Sequence[Colour], width: int) -> None:
    """Draw boxes [N, 4], clipped to the canvas; one colour for all, or one for each."""
    draw = ImageDraw.Draw(canvas)
    limit = np.array([canvas.width - 1, canvas.height - 1] * 2)
    for index, box in enumerate(boxes):
        if not np.isfinite(box).all():
            continue
        left, top, right, bottom = (float(value) for value in np.clip(box, 0, limit))
        draw.rectangle((left, top, right, bottom), outline=colours[index % len(colours)], width=width)


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


def _draw_legend(draw: ImageDraw.ImageDraw, seen: SeenStages, score_threshold: float, place: tuple[int, int]) -> None:
    """A swatch and the name of every class that is detected, the most frequent first, as far as the row reaches."""
    top, width = place
    found, counts = np.unique(seen.detections.above(score_threshold).labels, return_counts=True)
    left = _GAP
    for label in found[np.argsort(-counts, kind="stable")]:
        name, font = caption(seen.metadata.category_name(int(label)), 16)
        right = left + 24 + _text_width(name, font)
        if right > width - _GAP:
            draw.text((left, top), "...", fill=_CAPTION_COLOUR, font=font)
            break
        colour = class_colour(seen.metadata.category_ids.index(int(label)))
        draw.rectangle((left, top + 3, left + 16, top + 17), fill=colour)
        draw.text((left + 22, top), name, fill=_CAPTION_COLOUR, font=font)
        left = int(right) + 20

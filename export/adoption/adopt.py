"""The steps from a foreign file to an adopted one, each checked by running."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from asag import __version__
from asag.export.adoption.adapters import Extent, put_in_contract
from asag.export.adoption.attention import find_candidates
from asag.export.adoption.comparison import IN_HALF, Comparison, compare_files
from asag.export.adoption.execution import FileRun, foreign_feeds, numpy_type, shape_of, with_dims
from asag.export.adoption.foreign_file import ForeignFile, fix_sides, read_foreign
from asag.export.adoption.graph import GraphIndex, all_graphs
from asag.export.adoption.layouts import Interface, Port, graph_inputs, recognise
from asag.export.adoption.outlook import head_size
from asag.export.adoption.pictures import verification_pictures
from asag.export.adoption.plan import AdoptionOptions, Plan, input_size, make_plan
from asag.export.adoption.rewriting import replace_attentions, replace_samples, unfit_grids
from asag.export.adoption.verification import (
    Attention,
    Occasion,
    asked_shapes,
    confirm,
    names_to_observe,
    propose,
)
from asag.export.op_bodies import bodies_of
from asag.export.op_bodies.domain import DOMAIN_VERSION
from asag.export.operator_set import STANDARD_DOMAINS
from asag.runtime.errors import one_line
from asag.runtime.files import write_bytes
from asag.runtime.metadata import FOREIGN, ModelMetadata
from asag.runtime.onnx_file import write_metadata
from asag.runtime.preprocessing import prepare
from asag.trt_plugins.operations import DOMAIN

Say = Callable[[str], None]


@dataclass(frozen=True)
class AdoptionReport:
    """What an adoption wrote. ``samples`` counts the GridSamples of the foreign file, ``within`` those that were part
    of the ``attentions``; ``assumed`` and ``warnings`` are lines for a person.
    """

    path: Path
    metadata: ModelMetadata
    assumed: tuple[str, ...]
    warnings: tuple[str, ...]
    samples: int
    within: int
    attentions: int
    comparison: Comparison

    def summary(self) -> str:
        """All of it in one line."""
        metadata, compared = self.metadata, self.comparison
        alone = metadata.replaced.get("SampleGrid", 0)
        parts = []
        if self.attentions:
            parts.append(f"{_count(self.attentions, 'deformable attention')} replaced ({self.within} GridSample)")
        if alone:
            parts.append(f"{alone} {'other ' * bool(self.attentions)}GridSample replaced")
        if self.samples > self.within + alone:
            parts.append(f"{self.samples - self.within - alone} GridSample kept")
        return (
            f"{self.path.name}: layout {metadata.layout}, {metadata.input_height}x{metadata.input_width}"
            f" {metadata.resize}, {', '.join(parts) or 'no GridSample to replace'}, {compared.found:,} of"
            f" {compared.detections:,} detections as before, scores within {compared.score_difference:.0e}"
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def adopt(source: Path, target: Path, options: AdoptionOptions, say: Say = lambda line: None) -> AdoptionReport:
    """Write the foreign file `source` to `target` as one of our contract; `say` hears of each phase.

    Raises FileNotFoundError or ValueError, in one line, for what cannot be adopted, and where a detection of the
    foreign file is not found in the adopted one; then nothing is written.
    """
    foreign = read_foreign(source)
    try:
        return _Adoption(foreign, options, say).write(target)
    except ValueError as error:
        raise ValueError(f"{source}: {one_line(error)}") from None


_ODD_PLACES = (
    " (it samples at places that are no numbers, where runtimes differ: is a level only one cell high or wide?)"
)


class _Adoption:
    """One file on its way."""

    def __init__(self, foreign: ForeignFile, options: AdoptionOptions, say: Say) -> None:
        self.foreign, self.options, self.say = foreign, options, say
        self.proto = foreign.proto
        self.notes: list[str] = []
        self.size = (0, 0)
        self.odd_places = False
        self.candidates = () if options.keep_grid_sample else find_candidates(GraphIndex(self.proto.graph))
        self.observed = [name for candidate in self.candidates for name in names_to_observe(candidate)]
        self.blank = Occasion(0, {}, {}, {})
        self.interface = self._recognise()

    def write(self, target: Path) -> AdoptionReport:
        head = head_size(GraphIndex(self.proto.graph))
        plan = make_plan(self.interface, self.size, self.options, self.foreign.said, head)
        extent = Extent(_rows(self.interface))
        pictures = verification_pictures(self.size, self.options.images)
        metadata = _metadata(plan, extent, self.foreign)
        samples = sum(node.op_type == "GridSample" for graph in all_graphs(self.proto.graph) for node in graph.node)
        adopted = onnx.ModelProto()
        adopted.CopyFrom(self.proto)
        found: tuple[Attention, ...] = ()
        kept: tuple[str, ...] = ()
        if not self.options.keep_grid_sample:
            self.say("looking for deformable attention")
            found = self._attentions(plan, metadata, [picture for _, picture in pictures])
            replace_attentions(adopted, found)
            kept = replace_samples(adopted, unfit_grids(self.proto))
            if kept and self.options.strict:
                raise ValueError(f"GridSample with {kept[0]} has no replacement; without --strict it is kept")
        ops = Counter(
            node.op_type for graph in all_graphs(adopted.graph) for node in graph.node if node.domain == DOMAIN
        )
        metadata = dataclasses.replace(metadata, replaced=dict(ops))
        put_in_contract(adopted, plan, extent)
        adopted = _finished(adopted, self.foreign.operator_set, metadata)
        self.say("comparing detections")
        comparison = self._compare(adopted, plan, metadata, pictures)
        warnings = [f"{count} GridSample with {what} kept" for what, count in Counter(kept).items()]
        if self.foreign.half is not None:
            self.say("comparing with 16 bits")
            warnings.append(_against_half(self.foreign.half, FileRun(adopted), plan, metadata, pictures))
        write_bytes(target, adopted.SerializeToString())
        within = {level.node for attention in found for level in attention.candidate.levels}
        assumed = (*self.notes, *plan.assumed)
        return AdoptionReport(target, metadata, assumed, tuple(warnings), samples, len(within), len(found), comparison)

    def _recognise(self) -> Interface:
        """The file's layout, its height and width made static. What the outputs leave open, a run tells; a file that
        leaves its batch open and runs with one image only gets that fixed, too.
        """
        inputs, outputs = self.foreign.inputs, self.foreign.outputs
        image = next((port for port in inputs if len(port.dims) == 4), None)
        if image is None:
            return recognise(inputs, outputs, self.options.layout)
        self.size = input_size(image, self.options.input_size)
        inputs = tuple(_with_sides(port, image.dims[0], self.size) for port in inputs)
        fix_sides(self.proto, inputs)
        batch = image.dims[0]
        try:
            outputs, self.blank = self._run_blank(inputs, batch or 2, outputs)
        except ValueError:
            if batch is not None:
                raise
            batch = 1
            self.notes.append("it runs with one image only, though it leaves its batch open: the batch is 1")
            inputs = tuple(_with_sides(port, batch, self.size) for port in inputs)
            fix_sides(self.proto, inputs)
            outputs, self.blank = self._run_blank(inputs, batch, outputs)
        return recognise(inputs, outputs, self.options.layout)

    def _run_blank(
        self, inputs: Iterable[Port], batch: int, outputs: tuple[Port, ...]
    ) -> tuple[tuple[Port, ...], Occasion]:
        """The outputs with the sides that a run gives them, and what else there is to know of that run."""
        feeds = _blank(inputs, batch)
        asked = asked_shapes(self.proto.graph)
        found = FileRun(self.proto, [*(port.name for port in outputs), *asked], measured=self.observed).run(feeds)
        shapes = {name: tuple(found[shape_of(name)]) for name in self.observed}
        return with_dims(outputs, found), Occasion(batch, feeds, shapes, {name: found[name] for name in asked})

    def _compare(
        self,
        adopted: onnx.ModelProto,
        plan: Plan,
        metadata: ModelMetadata,
        pictures: Sequence[tuple[str, Image.Image]],
    ) -> Comparison:
        """Raises ValueError where a detection of the foreign file is not in the adopted one."""
        found = compare_files(FileRun(self.proto), FileRun(adopted), plan, metadata, pictures)
        if 0 < len(found.differing) <= len(pictures) / 2:
            # Where queries nearly tie, rounding chooses others and all detections of a picture move; a runtime rounds
            # otherwise for each graph and batch. Image by image, and not rewritten, both files compute the same up to
            # our ops. An error would be in most pictures.
            theirs, ours = (FileRun(proto, optimized=False) for proto in (self.proto, adopted))
            found = compare_files(theirs, ours, plan, metadata, pictures, at_once=1)
        if found.differing:
            lost = found.detections - found.found
            raise ValueError(
                f"{lost:,} of {found.detections:,} detections differ, first in {found.differing[0]};"
                f" nothing was written{_ODD_PLACES * self.odd_places}"
            )
        return found

    def _attentions(
        self, plan: Plan, metadata: ModelMetadata, pictures: Sequence[Image.Image]
    ) -> tuple[Attention, ...]:
        if not self.candidates:
            return ()
        batch = self.interface.batch or 1
        whole = dataclasses.replace(metadata, resize="stretch")
        tensors = prepare([pictures[number % len(pictures)] for number in range(batch)], whole)
        feeds = foreign_feeds(tensors["images"], tensors["sizes"], plan)
        seen = FileRun(self.proto, self.observed, optimized=False).run(feeds)
        self.odd_places = any(np.isnan(seen[level.grid]).any() for one in self.candidates for level in one.levels)
        proposed = [propose(candidate, seen, batch) for candidate in self.candidates]
        del seen  # gigabytes, in large encoders
        return confirm(self.proto, [one for one in proposed if one is not None], self.blank)


def _against_half(
    half: onnx.ModelProto,
    adopted: FileRun,
    plan: Plan,
    metadata: ModelMetadata,
    pictures: Sequence[tuple[str, Image.Image]],
) -> str:
    """What to say of a file that computes in 16 bits, now that the adopted one does not."""
    said = "the file computes in 16 bits, the adopted one in float32"
    types = {port.name: port.type for port in graph_inputs(half.graph)}
    inputs = {role: dataclasses.replace(port, type=types[port.name]) for role, port in plan.interface.inputs.items()}
    plan = dataclasses.replace(plan, interface=dataclasses.replace(plan.interface, inputs=inputs))
    try:
        compared = compare_files(FileRun(half), adopted, plan, metadata, pictures, close=IN_HALF)
    except ValueError as error:
        return f"{said}; not compared, since in 16 bits {one_line(error)}"
    return (
        f"{said}; {compared.found:,} of {compared.detections:,} detections in 16 bits are found again"
        f" (IoU {IN_HALF.iou}, scores within {IN_HALF.score}): adopt its float32 export if there is one"
    )


def _with_sides(port: Port, batch: int | None, size: tuple[int, int]) -> Port:
    """An input of a detector with the sides that it then has."""
    sides = {4: (batch, 3, *size), 3: (batch, *size), 2: (batch, *port.dims[1:])}
    return dataclasses.replace(port, dims=sides.get(len(port.dims), port.dims))


def _blank(inputs: Iterable[Port], batch: int) -> dict[str, Any]:
    """Something to feed a file: grey images without padding."""
    return {
        port.name: np.full((batch, *(side or 2 for side in port.dims[1:])), 0.5 if len(port.dims) == 4 else 1).astype(
            numpy_type(port)
        )
        for port in inputs
    }


def _rows(interface: Interface) -> int:
    """Queries, or ranked detections, of an image."""
    role = next(name for name in ("rows", "logits", "scores") if name in interface.outputs)
    rows = interface.outputs[role].dims[1]
    assert rows is not None, "a run told"
    return rows


def _metadata(plan: Plan, extent: Extent, foreign: ForeignFile) -> ModelMetadata:
    names = plan.classes.names
    return ModelMetadata(
        family=FOREIGN,
        preset=re.sub(r"[^A-Za-z0-9_.-]", "-", foreign.path.stem).lstrip("-.") or FOREIGN,
        choices={},
        stages=(),
        half_layers=(),
        precision="fp32",
        input_height=plan.size[0],
        input_width=plan.size[1],
        input_type="uint8",
        shorter_side=min(plan.size),
        longer_side=max(plan.size),
        mean=plan.mean,
        std=plan.std,
        category_ids=plan.classes.ids,
        category_names=tuple(names[number] for number in plan.classes.ids),
        nms_iou=None,
        max_detections=extent.detections(plan.interface.layout.ranked),
        package_version=__version__,
        weights_digest=foreign.digest,
        resize=plan.resize,
        interpolation=plan.interpolation,
        layout=plan.interface.layout.name,
        source_digest=foreign.digest,
    )


def _finished(proto: onnx.ModelProto, operator_set: int, metadata: ModelMetadata) -> onnx.ModelProto:
    """With the ops' bodies, in the file's own operator set; shapes inferred, and checked."""
    bodies = bodies_of(node for graph in all_graphs(proto.graph) for node in graph.node)
    for body in bodies:
        for entry in body.opset_import:
            if entry.domain in STANDARD_DOMAINS:
                entry.version = operator_set
    if bodies:
        proto.functions.extend(bodies)
        proto.opset_import.add(domain=DOMAIN, version=DOMAIN_VERSION)
    proto.ir_version = max(proto.ir_version, 8)  # the first with functions
    del proto.metadata_props[:]
    write_metadata(proto, metadata)
    proto = onnx.shape_inference.infer_shapes(proto)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"the adopted file would not be valid ONNX: {one_line(error)}") from None
    return proto

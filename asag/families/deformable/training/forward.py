"""The forward pass of training: what every layer says, and how the kept tokens were chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asag.families.deformable.detector import DeformableDetector, Queries, rows
from asag.families.deformable.encoder import Kept, kept_counts
from asag.families.deformable.heads import Head
from asag.families.deformable.proposals import proposal_boxes
from asag.families.deformable.training.attention_map import decoder_attention_map, kept_shares, wanted_tokens
from asag.parts.boxes import inverse_sigmoid
from asag.parts.deformable_attention import Sampling
from asag.parts.deformable_layers import DecoderLayer
from asag.parts.levels import Levels, levels_of
from asag.training.protocol import Batch, Step
from asag.training.recollection import (
    Copies,
    StagePredictions,
    as_copies,
    as_images,
    as_queries,
    one_by_one,
    recollected,
)
from asag.training.transfer import to_device


@dataclass(frozen=True)
class Selection:
    """How useful each token was thought to be, and whether the decoder looked at it."""

    scores: Tensor
    """[B, T] logits."""
    wanted: Tensor
    """[B, T] float, 0 or 1."""
    kept_shares: Tensor
    """[B, 1 + L], see :func:`asag.families.deformable.training.attention_map.kept_shares`."""


@dataclass(frozen=True)
class TrainingOutputs:
    """What is scored in training."""

    decoder: tuple[StagePredictions, ...]
    """Of every layer."""
    proposals: StagePredictions | None = None
    """Of all tokens, where the queries are chosen from them."""
    encoder: tuple[StagePredictions, ...] = ()
    """Of the kept tokens after every layer but the last, where they have heads."""
    selection: Selection | None = None
    """Of a sparse encoder."""


def training_outputs(detector: DeformableDetector, batch: Batch, step: Step, recollection: str) -> TrainingOutputs:
    """What every layer says; recollection: one of :data:`asag.training.settings.RECOLLECTIONS`."""
    precision = step.feature_precision
    with torch.autocast(batch.images.device.type, dtype=precision, enabled=precision is not None):
        maps = detector.features(batch.images)
    levels = levels_of(maps, to_device(batch.sizes, batch.images.device), batch.images)
    source, position = levels.flat(maps), levels.embedding(detector.level_embedding)
    references, usable = proposal_boxes(levels)

    ratio, kept, scores = detector.config.keeping_ratio, None, None
    if ratio is not None:
        scores = detector.scores_of_tokens(source, position, levels, usable)
        # The batch's sizes are on the CPU: a GPU would be waited for.
        most = int(kept_counts(levels_of(maps, batch.sizes, batch.images).padded, ratio).max())
        kept = _most_useful(scores, kept_counts(levels.padded, ratio), most)
    memory, stream = detector.encoder(source, position, levels, kept)

    queries, proposals = _start(detector, memory, references, usable)
    found, samplings = _decode(detector, queries, memory, levels, recollection)
    if kept is None or scores is None:
        return TrainingOutputs(found, proposals)
    of_kept = kept.of(references)
    heads = list(detector.encoder_heads) if detector.config.encoder_heads else []
    encoder = tuple(_say(head, tokens, of_kept) for head, tokens in zip(heads, stream, strict=False))
    looked_at = decoder_attention_map(samplings, levels.shapes)
    wanted = wanted_tokens(looked_at, levels.padded, kept.active.sum(1), kept.active.shape[1])
    shares = kept_shares(looked_at, kept.indices, levels.shapes)
    return TrainingOutputs(found, proposals, encoder, Selection(scores, wanted, shares))


def _most_useful(scores: Tensor, counts: Tensor, most: int) -> Kept:
    """As many tokens of every image as the one with most needs, by falling score, those that are too many not active.

    The heads of the encoder learn from these, too.
    """
    active = torch.arange(most, device=scores.device) < counts.unsqueeze(1)
    return Kept(scores.detach().topk(most, dim=1).indices, active)


def _say(head: nn.Module, queries: Tensor, references: Tensor) -> StagePredictions:
    """What a head says of queries [B, N, C]; references: [B, N, 4] logits."""
    assert isinstance(head, Head)
    return StagePredictions(head.logits(queries).unsqueeze(0), head.boxes(queries, references).unsqueeze(0))


def _start(
    detector: DeformableDetector, memory: Tensor, references: Tensor, usable: Tensor
) -> tuple[Queries, StagePredictions | None]:
    """What the decoder begins with, and what all tokens say where it begins with some of them."""
    if not detector.config.two_stage:
        return detector.learned_queries(memory.shape[0]), None
    said = _say(detector.encoder_head(), detector.candidates(memory, usable), references)
    chosen = detector.best_tokens(said.logits[0])
    return detector.queries_of_tokens(memory, chosen, rows(said.boxes[0], chosen)), said


def _decode(
    detector: DeformableDetector, queries: Queries, memory: Tensor, levels: Levels, recollection: str
) -> tuple[tuple[StagePredictions, ...], list[Sampling]]:
    """What every layer says, of all copies, and where the queries of the ordinary path looked."""
    before: Copies | None = None
    last: Copies = (queries.content.unsqueeze(0),)
    references = queries.references
    run = _one_by_one if recollection == "one_by_one" else _together
    found, samplings = [], []
    for number, layer in enumerate(detector.decoder):
        assert isinstance(layer, DecoderLayer)
        (content,) = recollected(before, last, recollection)
        content, sampling = run(layer, content, queries.position, references, memory, levels)
        head = detector.head(number)
        boxes = head.boxes(content, inverse_sigmoid(references))
        found.append(StagePredictions(head.logits(content), boxes))
        samplings.append(sampling)
        before, last = last, (content,)
        if detector.config.refine_boxes:
            references = boxes[-1].detach()  # a box teaches no earlier layer
    return tuple(found), samplings


def _one_by_one(
    layer: DecoderLayer, content: Tensor, position: Tensor, references: Tensor, memory: Tensor, levels: Levels
) -> tuple[Tensor, Sampling]:
    """Each copy through the layer by itself. content: [K, B, N, C]; position and references: [B, N, ...]."""
    samplings = []

    def pass_copy(content: Tensor) -> Copies:
        queries, sampling = layer(content, position, references, memory, levels)
        samplings.append(sampling)
        return (queries,)

    (made,) = one_by_one(pass_copy, (content,))
    return made, samplings[-1]


def _together(
    layer: DecoderLayer, content: Tensor, position: Tensor, references: Tensor, memory: Tensor, levels: Levels
) -> tuple[Tensor, Sampling]:
    """All copies at once; arguments as in :func:`_one_by_one`."""
    count, _, each, _ = content.shape
    position, references = (part.expand(count, -1, -1, -1) for part in (position, references))
    attended = layer.attend(as_images(content), as_images(position)).unflatten(0, (count, -1))
    made, sampling = layer.look(as_queries(attended), as_queries(position), as_queries(references), memory, levels)
    return as_copies(made, count), Sampling(*(part[:, -each:] for part in sampling))

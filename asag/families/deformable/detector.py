"""The detector: backbone, neck, encoder, queries, decoder."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from asag.detector import Detector, Predictions, stage
from asag.families.deformable.config import LEVELS, RESNETS, DeformableConfig
from asag.families.deformable.encoder import Encoder, Kept, TokenScorer, keep_best
from asag.families.deformable.heads import Head
from asag.families.deformable.neck import LevelNeck
from asag.families.deformable.proposals import Candidates, best_first, proposal_boxes
from asag.parts.backbones.resnet import ResNet
from asag.parts.backbones.swin import Swin
from asag.parts.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from asag.parts.deformable_attention import Sampling
from asag.parts.deformable_layers import BoxEmbedding, DecoderLayer, initialize_transformer
from asag.parts.levels import Levels, levels_of


@dataclass(frozen=True)
class Queries:
    """What the decoder begins with."""

    content: Tensor
    """[B, N, C]"""
    position: Tensor
    """[B, N, C], the same for every layer."""
    references: Tensor
    """[B, N, 2 or 4], points or `cxcywh` boxes, fractions of the content."""


class DeformableDetector(Detector):
    """Deformable, Efficient and Sparse DETR; inputs as in :class:`asag.detector.Detector`."""

    config: DeformableConfig

    def __init__(self, config: DeformableConfig) -> None:
        super().__init__()
        self.config = config
        size, channels = config.size, config.size.channels
        kind = ResNet if config.backbone in RESNETS else Swin
        self.backbone = kind(config.backbone, size.backbone_width, config.train_batch_statistics)
        self.neck = LevelNeck(self.backbone.channels[-3:], channels, size.norm_groups, config.projection_bias)
        self.level_embedding = nn.Parameter(torch.randn(LEVELS, channels))
        self.encoder = Encoder(config)
        widths = channels, size.attention_heads, LEVELS, size.points, size.feed_forward
        self.decoder = nn.ModuleList(DecoderLayer(*widths, config.dropout) for _ in range(size.decoder_layers))
        heads = size.decoder_layers if config.head_per_layer else 1
        self.heads = nn.ModuleList(Head(channels, config.classes) for _ in range(heads))
        if config.two_stage:
            self.candidates = Candidates(channels)
            self.box_embedding = BoxEmbedding(channels, channels if config.content_from_memory else 2 * channels)
            if config.head_per_layer:
                self.proposal_head = Head(channels, config.classes)
        else:
            self.query_embedding = nn.Parameter(torch.randn(config.queries, 2 * channels))
            self.reference_points = nn.Linear(channels, 2)
        if config.sparse:
            self.token_scorer = TokenScorer(channels)
        if config.encoder_heads:
            self.encoder_heads = nn.ModuleList(Head(channels, config.classes) for _ in range(size.encoder_layers - 1))
        self._initialize()

    def _initialize(self) -> None:
        """Matrices of the transformer by Glorot's rule, then its attention as it has to begin; boxes of learned
        queries begin small.
        """
        parts = ("encoder", "decoder", "candidates", "box_embedding", "reference_points", "token_scorer")
        initialize_transformer([getattr(self, name) for name in parts if hasattr(self, name)])
        if not self.config.two_stage:
            nn.init.zeros_(self.reference_points.bias)
            self.head(0).start_small()

    def features(self, images: Tensor) -> list[Tensor]:
        """Images -> P3..P6, each [B, C, h, w]; in float32 where autocast made them less."""
        maps = self.neck(self.backbone(images)[-3:])
        return [feature.to(torch.promote_types(feature.dtype, torch.float32)) for feature in maps]

    def head(self, layer: int) -> Head:
        """What tells the classes and boxes of a decoder layer."""
        head = self.heads[layer if self.config.head_per_layer else 0]
        assert isinstance(head, Head)
        return head

    def encoder_head(self) -> Head:
        """What tells the classes and boxes of the encoder's tokens."""
        return self.proposal_head if self.config.head_per_layer else self.head(0)

    def scores_of_tokens(self, source: Tensor, position: Tensor, levels: Levels, usable: Tensor) -> Tensor:
        """[B, T], how much a sparse encoder wants each token."""
        return self.token_scorer(self.candidates(source + position, usable), levels.padded)

    def learned_queries(self, images: int) -> Queries:
        """The same for each image."""
        position, content = self.query_embedding.expand(images, -1, -1).chunk(2, dim=-1)
        return Queries(content, position, self.reference_points(position).sigmoid())

    def best_tokens(self, logits: Tensor) -> Tensor:
        """Class logits of the encoder's tokens [B, T, classes] -> indices [B, N] of the most promising ones.

        Raises ValueError where there are fewer tokens than queries.
        """
        if logits.shape[1] < self.config.queries:
            raise ValueError(f"an input of {logits.shape[1]} cells has no room for {self.config.queries} queries")
        ranking = logits.amax(-1) if self.config.rank_by_class else logits[..., 0]
        return best_first(ranking, self.config.queries)

    def queries_of_tokens(self, memory: Tensor, chosen: Tensor, boxes: Tensor) -> Queries:
        """memory: [B, T, C]; chosen: [B, N] indices of tokens; boxes: [B, N, 4], theirs."""
        boxes = boxes.detach()
        embedding = self.box_embedding(boxes)
        if self.config.content_from_memory:
            return Queries(rows(memory, chosen), embedding, boxes)
        position, content = embedding.chunk(2, dim=-1)
        return Queries(content, position, boxes)

    def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
        """What the last layer predicts."""
        p3, p4, p5, p6 = self.features(images)
        maps = stage("features", p3=p3, p4=p4, p5=p5, p6=p6)
        levels = levels_of(maps, sizes, images)
        memory = self._encode(levels.flat(maps), levels)
        queries = self._start(memory, levels)
        content, references = queries.content, queries.references
        last = len(self.decoder) - 1
        for number, layer in enumerate(self.decoder):
            assert isinstance(layer, DecoderLayer)
            attended = layer.attend(content, queries.position)
            places, weights = layer.sampling(attended, queries.position, references, levels)
            if number == last:
                (places,) = stage(f"decoder_{number}", points=places)
            content = layer.gather(attended, Sampling(places, weights), memory, levels)
            values = {"queries": content}
            if self.config.refine_boxes and number < last:
                values["boxes"] = self.head(number).boxes(content, inverse_sigmoid(references))
            content, *refined = stage(f"decoder_{number}", **values)
            references = refined[0] if refined else references
        head = self.head(last)
        boxes = head.boxes(content, inverse_sigmoid(references))
        if self.config.clip_boxes:
            boxes = xyxy_to_cxcywh(cxcywh_to_xyxy(boxes).clamp(0, 1))
        return Predictions(*stage("head", logits=head.logits(content), boxes=boxes))

    def _encode(self, source: Tensor, levels: Levels) -> Tensor:
        """Tokens [B, T, C] -> memory [B, T, C]."""
        position, kept = levels.embedding(self.level_embedding), None
        if self.config.keeping_ratio is not None:
            _, usable = proposal_boxes(levels)
            scores = self.scores_of_tokens(source, position, levels, usable).unsqueeze(-1)
            (scores,) = stage("token_scores", scores=scores)
            kept = keep_best(scores.squeeze(-1), levels.padded, self.config.keeping_ratio)
            kept = Kept(*stage("kept_tokens", cells=kept.indices, active=kept.active))
        memory, _ = self.encoder(source, position, levels, kept)
        m3, m4, m5, m6 = levels.maps(memory)
        return levels.flat(stage("encoder", m3=m3, m4=m4, m5=m5, m6=m6))

    def _start(self, memory: Tensor, levels: Levels) -> Queries:
        """Memory [B, T, C] -> what the decoder begins with."""
        if not self.config.two_stage:
            queries = self.learned_queries(memory.shape[0])
            content, points = stage("start", queries=queries.content, points=queries.references)
            return Queries(content, queries.position, points)
        references, usable = proposal_boxes(levels)
        candidates, head = self.candidates(memory, usable), self.encoder_head()
        chosen = self.best_tokens(head.logits(candidates))
        boxes = head.boxes(rows(candidates, chosen), rows(references, chosen))
        queries = self.queries_of_tokens(memory, chosen, boxes)
        content, boxes = stage("proposals", queries=queries.content, boxes=queries.references)
        return Queries(content, queries.position, boxes)

    def deployed(self) -> Self:
        """A copy in evaluation mode without the heads that only training hears."""
        model = copy.deepcopy(self)
        if self.config.encoder_heads:
            del model.encoder_heads
        if self.config.head_per_layer:
            for head in model.heads[:-1]:
                del head.class_logits
                if not self.config.refine_boxes:
                    del head.box_deltas
        return model.eval().requires_grad_(False)


def rows(values: Tensor, indices: Tensor) -> Tensor:
    """[B, T, C] and [B, N] -> the rows [B, N, C]."""
    return values.gather(1, indices.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

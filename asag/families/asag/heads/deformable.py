"""The deformable head of ASAG-D (README of the family, section 5; "Deformable DETR", sections 4.1 and A.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asag.detector import stage
from asag.families.asag.config import ASAGConfig
from asag.families.asag.encoder import LEVELS
from asag.families.asag.proposals import Proposals
from asag.families.asag.pyramid import Pyramid
from asag.parts.boxes import inverse_sigmoid
from asag.parts.deformable_layers import BoxEmbedding, DecoderLayer, initialize_transformer
from asag.parts.layers import Branches, exclude


class DeformableHead(nn.Module):
    """Proposals -> class logits [B, N, classes] and boxes [B, N, 4] (`cxcywh`, fractions of the content)."""

    def __init__(self, config: ASAGConfig) -> None:
        super().__init__()
        size = config.size
        self.box_embedding = BoxEmbedding(size.channels, size.channels)
        widths = size.channels, size.attention_heads, LEVELS, size.attended_points, size.deformable_feed_forward
        self.layer = DecoderLayer(*widths, dropout=0.0)
        self.branches = Branches(size.channels, config.classes)
        initialize_transformer([self.box_embedding, self.layer])

    def forward(
        self, pyramid: Pyramid, queries: Tensor, proposals: Proposals, allowed: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """queries: [B, N, C], the proposals' plus this head's embedding; allowed: attention mask; sizes: [B, 2]."""
        levels = pyramid.levels
        assert levels is not None
        # A proposal may reach beyond the image, where a fraction has no logit.
        references = proposals.boxes.clamp(0, 1)
        position = self.box_embedding(references)
        nothing = torch.zeros((1, 1, 1, 1), device=queries.device)
        queries = self.layer.attend(queries, position, exclude(nothing, allowed))
        sampling = self.layer.sampling(queries, position, references, levels)
        (locations,) = stage("head", points=sampling.locations)
        queries = self.layer.gather(queries, sampling._replace(locations=locations), levels.flat(pyramid.maps), levels)
        logits, deltas = self.branches(queries)
        return logits, (inverse_sigmoid(references) + deltas).sigmoid()

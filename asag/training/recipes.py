"""Parts of the presets' recipes that several families share. Imports no PyTorch."""

from __future__ import annotations

MULTI_SCALE = {"training_shorter_sides": tuple(range(480, 801, 32)), "crop_probability": 0.5}
"""Sizes and crops, as DETR trains (Carion et al., ECCV 2020)."""

FROM_RANDOM_WEIGHTS = {
    "batch_size": 8,
    "learning_rate": 1e-3,
    "backbone_learning_rate": 1e-3,
    "weight_decay": 0.05,
    "gradient_clip": 1.0,
    "warmup_steps": 200,
    "schedule": "cosine",
    "milestones": (),
    "ema_decay": 0.998,
    "workers": 0,
}
"""Of a small detector on few small images: the backbone learns as fast as the rest."""

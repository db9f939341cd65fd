"""ASAG's training as the loop sees it: the forward pass, the divisors and the losses of one detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from asag.families.asag.detector import ASAGDetector
from asag.families.asag.training.settings import ASAGSettings
from asag.training.protocol import Batch, ParameterGroup, Step, Target, rates_of

"""ASAG's training as the loop sees it: the forward pass, the divisors and the losses of one detector."""

from __future__ import annotations

"""ONNX bodies of the custom ops: the same arithmetic as the definitions in `asag.ops`, in standard operators.

Each body keeps to operators that every target implements (no NonMaxSuppression, NonZero, RoiAlign or GridSample) and
has no shape that depends on the data. A runtime that knows the op uses its kernel, any other inlines the body.
"""

from onnxscript import OnnxFunction

from export.functions.adaptive_probing import AdaptiveProbing
from export.functions.gather_anchors import GatherAnchors
from export.functions.pyramid import FlattenPyramid
from export.functions.pyramid_roi_align import PyramidRoIAlign
from export.functions.sampling_mixing import SamplingMixing

OP_FUNCTIONS: tuple[OnnxFunction, ...] = (AdaptiveProbing, GatherAnchors, PyramidRoIAlign, SamplingMixing)
"""The custom ops: nodes of the exported graph."""

HELPER_FUNCTIONS: tuple[OnnxFunction, ...] = (FlattenPyramid,)
"""Called by the ops' bodies only."""

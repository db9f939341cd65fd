"""The operator sets that the bodies are written in."""

from onnxscript import opset20
from onnxscript.values import Opset

from asag.trt_plugins.operations import DOMAIN

DOMAIN_VERSION = 1
OPSET_VERSION = 20

asag_opset = Opset(DOMAIN, DOMAIN_VERSION)
op = opset20

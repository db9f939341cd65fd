"""From an exported ONNX file to a network that a builder takes: checked, its `asag` ops lowered, parsed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from asag.runtime.engines.backend import EngineBackend
from asag.runtime.errors import BackendUnavailableError, one_line
from asag.runtime.metadata import ModelMetadata


@dataclasses.dataclass(frozen=True)
class SourceModel:
    """An exported file that has passed every check.

    ``proto`` is its ModelProto as it is in the file, ``inlined`` the same with functions replaced by their bodies;
    ``fixed_batch`` its batch size where that is not dynamic.
    """

    path: Path
    content: bytes
    proto: Any
    inlined: Any
    metadata: ModelMetadata
    fixed_batch: int | None

    def operators(self) -> dict[str, str]:
        """Operator of each node of the inlined graph by the node's name, where the name belongs to one operator."""
        found: dict[str, set[str]] = {}
        pending = list(self.inlined.graph.node)
        while pending:
            node = pending.pop()
            found.setdefault(node.name, set()).add(node.op_type)
            pending += [inner for attribute in node.attribute for inner in attribute.g.node]
        return {name: kinds.pop() for name, kinds in found.items() if len(kinds) == 1}


def read_source(path: Path) -> SourceModel:
    """Read and check an exported file.

    Raises FileNotFoundError for a missing file, ValueError for one that is damaged or not an asag model, and
    BackendUnavailableError without the onnx package.
    """
    try:
        import onnx
        import onnx.checker
        import onnx.inliner
    except ImportError:
        raise BackendUnavailableError("building an engine needs the onnx package: pip install onnx") from None
    from asag.trt_plugins.operations import DOMAIN

    if not path.exists():
        raise FileNotFoundError(f"model not found: {path}")
    try:
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # protobuf and onnx raise classes of their own
        raise ValueError(f"cannot read {path} as ONNX, export it again with `asag export`: {one_line(error)}") from None
    try:
        _check_names(model)
        metadata = ModelMetadata.from_properties({item.key: item.value for item in model.metadata_props})
        fixed_batch = _fixed_batch(model, metadata)
        inlined = onnx.inliner.inline_local_functions(model)
        left = sorted({node.op_type for node in inlined.graph.node if node.domain == DOMAIN})
        if left:
            raise ValueError(f"operators {', '.join(left)} have no function body in the file; export it again")
        try:
            # The builder's parser takes a graph at its word; one that is not sound can end the process.
            onnx.checker.check_model(inlined, full_check=True)
        except Exception as error:  # checker and inference have exception classes of their own
            raise ValueError(f"damaged, export it again with `asag export`: {one_line(error)}") from None
        return SourceModel(path, content, model, inlined, metadata, fixed_batch)
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def _check_names(model: Any) -> None:
    """Raise ValueError for names that are no text: the parser would print them to the terminal's dismay."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    values = (*model.graph.input, *model.graph.output, *model.graph.initializer, *model.graph.value_info)
    names = [value.name for value in values]
    for node in nodes:
        names += (node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute))
    # The reader gives what is not UTF-8 as bytes.
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a name in the file is no text, it is damaged; export it again with `asag export`")


def _fixed_batch(model: Any, metadata: ModelMetadata) -> int | None:
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    if set(shapes) != {"images", "sizes"}:
        raise ValueError(f"not an asag model: its inputs are {sorted(shapes)} instead of images and sizes")
    found = [dimension.dim_value for dimension in shapes["images"]][1:]
    if found != [3, *metadata.input_size]:
        raise ValueError(f"input images is {found} per image, but the metadata say {[3, *metadata.input_size]}")
    return shapes["images"][0].dim_value or None


def with_plugins(source: SourceModel) -> tuple[Any, dict[str, int]]:
    """A copy of the model whose ops that have a plugin are nodes without a body, and how often each is there.

    A parser prefers a body over a plugin of the same name (TensorRT before 10.7), so the bodies go; functions that are
    no op with a plugin are inlined. Raises ValueError for a node that does not name the plugins' namespace.
    """
    import onnx
    import onnx.helper
    import onnx.inliner

    from asag.trt_plugins.operations import DOMAIN, OPERATIONS

    model = onnx.ModelProto()
    model.CopyFrom(source.proto)
    others = [item for item in model.functions if item.domain != DOMAIN or item.name not in OPERATIONS]
    del model.functions[:]
    model.functions.extend(others)
    lowered = onnx.inliner.inline_local_functions(model)
    nodes = [node for node in lowered.graph.node if node.domain == DOMAIN]
    for node in nodes:
        named = {attribute.name: attribute.s for attribute in node.attribute}
        if named.get("plugin_namespace") != DOMAIN.encode():
            raise ValueError(f"{source.path}: node {node.name} names no plugin; export it again with `asag export`")
        # A plugin has no defaults; a file from before there was an attribute means the op's.
        for name, value in OPERATIONS[node.op_type].defaults.items():
            if name not in named:
                node.attribute.append(onnx.helper.make_attribute(name, value))
    return lowered, dict(Counter(node.op_type for node in nodes))


@dataclasses.dataclass(frozen=True)
class Network:
    """A parsed network with what must outlive it."""

    builder: Any
    definition: Any
    parser: Any

    def count_layers(self) -> tuple[dict[str, int], dict[str, int]]:
        """Layers by type, and their first outputs by element type, most frequent first."""
        layers, types = Counter[str](), Counter[str]()
        for index in range(self.definition.num_layers):
            layer = self.definition.get_layer(index)
            layers[layer.type.name.lower()] += 1
            if layer.num_outputs:
                types[layer.get_output(0).dtype.name.lower()] += 1
        return dict(layers.most_common()), dict(types.most_common())


def parse_network(backend: EngineBackend, module: Any, logger: Any, content: bytes, path: Path) -> Network:
    """Parse a serialized model into a strongly typed network whose plugins bring their kernels into the engine.

    ``path`` is the file's name for messages. Raises BackendUnavailableError where the builder does not start, and
    ValueError with the parser's first complaint.
    """
    try:
        builder = module.Builder(logger)
    except TypeError:  # what the bindings make of a builder that is null
        reason = [*logger.errors, "no reason was given"][0]
        raise BackendUnavailableError(f"{backend.title}'s builder does not start: {reason}") from None
    flags = module.NetworkDefinitionCreationFlag
    # Releases from 11 on know strongly typed networks only.
    chosen = 1 << int(flags.STRONGLY_TYPED)
    if hasattr(flags, "PREFER_AOT_PYTHON_PLUGINS"):
        chosen |= 1 << int(flags.PREFER_AOT_PYTHON_PLUGINS)
    definition = builder.create_network(chosen)
    parser = module.OnnxParser(definition, logger)
    if not parser.parse(content):
        complaints = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        reason = [*complaints, *logger.errors, "no reason was given"][0]
        raise ValueError(f"{backend.title} cannot parse {path}: {reason}")
    return Network(builder, definition, parser)


def _parser_error(error: Any) -> str:
    place = f" (node {error.node_name()}, {error.node_operator()})" if error.node_name() else ""
    return " ".join(error.desc().split()) + place

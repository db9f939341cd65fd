"""Training configurations in files: YAML or JSON of a person, or the record of an earlier run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from asag.runtime.errors import one_line
from asag.runtime.records import read_json
from asag.train.config import option_names

_RECORD_KEY = "training"
# What the record of a run says of that one process, not of the run.
_NOT_REPEATED = ("resume", "stop_after", "time_limit")


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The fields of a training configuration that a file names.

    The file is YAML or JSON with one entry per field, or the ``config.json`` of a run's folder, which then is repeated
    from its beginning: into a new folder beside the old one, unless another is asked for. Raises FileNotFoundError, or
    ValueError naming the file and what is wrong.
    """
    path = Path(path)
    content = _parse(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a training configuration: it must hold one `name: value` per line")
    record = content.get(_RECORD_KEY)
    values = dict(record) if isinstance(record, dict) else dict(content)
    known = option_names()
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        raise ValueError(
            f"{path} has entries that are no training options ({', '.join(unknown)}); docs/training.md lists them"
        )
    if isinstance(record, dict):
        for name in _NOT_REPEATED:
            values.pop(name, None)
        if values.get("output"):
            values["output"] = str(_free_name(Path(values["output"])))
    return values


def _parse(path: Path) -> Any:
    try:
        return read_json(path) if path.suffix == ".json" else _read_yaml(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no configuration file {path}") from None


def _read_yaml(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1, but 2e-4 is a number as in YAML 1.2, not a text."""

    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, [*"-+.0123456789"])
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path} as YAML: {one_line(error)}") from None


def _free_name(folder: Path) -> Path:
    """The folder itself, or the first of ``folder-2``, ``folder-3``, .. that does not exist."""
    number, name = 1, folder
    while name.exists():
        number += 1
        name = folder.with_name(f"{folder.name}-{number}")
    return name

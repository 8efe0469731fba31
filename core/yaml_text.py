"""Plain values as YAML text and back, for configurations that people write. A file that ends in `.json` is read as JSON.

The reader differs from YAML 1.1 where that surprises: `off`, `no` and `on` are words, `1e-3` is a number, `010` and `1:30` are words and not
8 and 90, and a key given twice is an error.
It makes plain values only. The package PyYAML (extra `[yaml]`) is loaded when it is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from .config_json import Json
from .errors import InvalidInput
from .files import check_input_file
from .foreign_text import shown
from .strict_json import strict_json

_MOST_BYTES = 1 << 20
_FLOAT = re.compile(r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)\Z|\.nan\Z")
_FLOAT_BEGINS = list("-+.0123456789")
_INT = re.compile(r"[-+]?(?:0|[1-9]\d*)\Z")
_REPLACED = tuple(f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp"))


def yaml_text(value: Json) -> str:
    """Write a value as YAML; as indented JSON, which YAML reads too, where PyYAML is not installed.

    Args:
        value: Plain values.

    Returns:
        The text, ending in a line break.
    """
    if importlib.util.find_spec("yaml") is None:
        return json.dumps(value, indent=2) + "\n"
    yaml: Any = importlib.import_module("yaml")
    text: str = yaml.dump(
        value, Dumper=_plain_dumper(yaml), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True
    )
    return text


def read_yaml(path: Path) -> Json:
    """Read a YAML or JSON file.

    Args:
        path: The file; its suffix tells which.

    Returns:
        Its plain value.

    Raises:
        InvalidInput: The file is missing, too large or not valid, or PyYAML is not installed.
    """
    check_input_file(path, "configuration", most=_MOST_BYTES)
    data = path.read_bytes()
    if path.suffix == ".json":
        return strict_json(data, str(path))
    if importlib.util.find_spec("yaml") is None:
        raise InvalidInput(
            f"{path} is read with the package PyYAML, which is not installed: pip install pyyaml, or give a .json file"
        )
    yaml: Any = importlib.import_module("yaml")
    try:
        return yaml.load(data, Loader=_plain_loader(yaml))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InvalidInput(f"{path} is not valid YAML: {shown(' '.join(str(error).split()), most=300)}") from error


def _plain_loader(yaml: Any) -> Any:
    """PyYAML's safe loader with the rules of this file."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if not isinstance(key, str):
                    raise yaml.constructor.ConstructorError(None, None, f"a key must be a word, found {key!r}", node.start_mark)
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    Loader.yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|false)\Z"), list("tf"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _FLOAT_BEGINS)
    return Loader


def _plain_dumper(yaml: Any) -> Any:
    """PyYAML's safe dumper, which puts words into quotes that this file's reader, or one of YAML 1.1, would take for something else."""

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        pass

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _FLOAT_BEGINS)
    return Dumper

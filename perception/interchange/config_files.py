"""Reads configurations of OpenPCDet (YAML) and mmdetection3d (Python) as data. Nothing in them is executed.

A configuration of mmdetection3d is a Python file of assignments. Its syntax tree is read: literals, lists, `dict(...)`, names that were
assigned before, and sums of them. Any other expression stands for itself as text, and only fails where somebody needs its value. A
statement that could change a setting in another way (`model["neck"] = ...`, `model.update(...)`, `if`) is refused with its line.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ...core.text_files import read_text

LARGEST_CONFIG = 4_000_000
"""Maximum size of a configuration in bytes. Merged ones have about 20,000."""
MOST_BASES = 50
"""Maximum number of files that a configuration is merged of."""

_BASE = "_BASE_CONFIG_"
_SUMS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


_HARMLESS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Pass)
"""Statements that change no setting that was assigned."""


class NotRead(str):
    """The text of an expression that is more than data."""


def read_yaml_config(path: str | Path) -> dict[str, Any]:
    """Read a configuration of OpenPCDet with the files that it is based on.

    Args:
        path: the `.yaml`. `_BASE_CONFIG_` is looked for from the folder of the file upwards: OpenPCDet means it from its folder `tools`.

    Returns:
        The settings; those of the file replace those of its bases.

    Raises:
        InvalidInput: A file is missing, too large or no YAML of settings, or PyYAML is not installed.
    """
    return _yaml(Path(path), [])


def _yaml(path: Path, chain: list[Path]) -> dict[str, Any]:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise InvalidInput("YAML is read with the package pyyaml; install it with: pip install -e '.[yaml]'") from error
    text = _config_text(path, chain)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InvalidInput(f"{path} is no YAML that can be read ({shown(str(error))[:300]})") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{path} holds a {type(content).__name__} and no settings; give a configuration of OpenPCDet")
    return _with_yaml_bases(content, path, [*chain, path])


def _with_yaml_bases(content: dict[str, Any], path: Path, chain: list[Path]) -> dict[str, Any]:
    """Put the settings of a base below those beside `_BASE_CONFIG_`, at every depth."""
    merged: dict[str, Any] = {}
    if isinstance(base := content.get(_BASE), str):
        folders = [path.parent, *path.resolve().parents]
        found = next((folder / base for folder in folders if (folder / base).is_file()), None)
        if found is None:
            raise InvalidInput(
                f"{path} is based on {shown(base)}, which is in no folder above it; keep OpenPCDet's folder tools/cfgs together"
            )
        merged = _yaml(found, chain)
    for name, value in content.items():
        if name == _BASE:
            continue
        value = _with_yaml_bases(value, path, chain) if isinstance(value, dict) else value
        old = merged.get(name)
        merged[name] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _over(base: dict[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over those of a base; `_delete_` drops the base's."""
    if value.get("_delete_") is True:
        return {name: entry for name, entry in value.items() if name != "_delete_"}
    merged = dict(base)
    for name, entry in value.items():
        old = merged.get(name)
        merged[name] = _over(old, entry) if isinstance(old, dict) and isinstance(entry, dict) else entry
    return merged


def read_python_config(path: str | Path) -> dict[str, Any]:
    """Read a configuration of mmdetection3d with the files of its `_base_`.

    Args:
        path: the `.py`, such as the merged one that a training leaves in its work folder.

    Returns:
        The settings; those of the file replace those of its bases.

    Raises:
        InvalidInput: A file is missing, too large, no Python, or of the kind that imports its bases as modules.
    """
    return _python(Path(path), [])


def python_config(text: str, source: str) -> dict[str, Any]:
    """Read a merged configuration that is in memory: mmdetection3d stores one in its checkpoints.

    Args:
        text: the Python text.
        source: where it comes from, for messages.

    Returns:
        The settings.

    Raises:
        InvalidInput: As for `read_python_config`, or the text has bases.
    """
    if len(text) > LARGEST_CONFIG:
        raise InvalidInput(f"{source} has {len(text):,} characters, more than the {LARGEST_CONFIG:,} that are read")
    values = _assignments(text, source, {})
    if values.pop("_base_", None):
        raise InvalidInput(f"{source} is based on other files, which are not there; give the configuration with --config")
    return values


def _python(path: Path, chain: list[Path]) -> dict[str, Any]:
    text = _config_text(path, chain)
    bases = _assignments(text, str(path), {}, only="_base_").get("_base_", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str) or "::" in base:
            raise InvalidInput(
                f"{path} is based on {shown(str(base))}, a file of another package; give the merged configuration that the training left in "
                "its work folder"
            )
        merged = _over(merged, _python(path.parent / base, [*chain, path]))
    values = _assignments(text, str(path), merged)
    values.pop("_base_", None)
    return _over(merged, values)


def _config_text(path: Path, chain: list[Path]) -> str:
    if path.resolve() in [other.resolve() for other in chain] or len(chain) > MOST_BASES:
        raise InvalidInput(f"{path} is based on itself")
    if not path.is_file():
        raise InvalidInput(f"there is no configuration {path}" + (f", on which {chain[-1]} is based" if chain else ""))
    if path.stat().st_size > LARGEST_CONFIG:
        raise InvalidInput(f"{path} has {path.stat().st_size:,} bytes, more than the {LARGEST_CONFIG:,} that are read")
    return read_text(path, "configuration")


def _assignments(text: str, source: str, base: Mapping[str, Any], only: str | None = None) -> dict[str, Any]:
    """The names that a Python text assigns at its top level."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InvalidInput(f"{source} is no Python that can be read ({shown(str(error))[:300]})") from error
    values: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.With) and "read_base" in ast.unparse(statement.items[0]):
            raise InvalidInput(
                f"{source} imports its bases as Python modules, and nothing is executed here; give the merged configuration that the "
                "training left in its work folder"
            )
        if isinstance(statement, ast.Assign) and all(isinstance(target, ast.Name) for target in statement.targets):
            for target in statement.targets:
                name = target.id  # type: ignore[attr-defined]
                if only in (None, name):
                    values[name] = _value(statement.value, values, base)
        elif not isinstance(statement, _HARMLESS) and not _names_no_setting(statement, values):
            raise InvalidInput(
                f"{source}, line {statement.lineno}: `{shown(ast.unparse(statement))[:80]}` may change a setting, and nothing is executed here; "
                "give the merged configuration that the training left in its work folder"
            )
    return values


def _names_no_setting(statement: ast.stmt, values: Mapping[str, Any]) -> bool:
    """Whether a statement is an expression that stands alone, such as a text or `os.mkdir(...)`, and names nothing that was assigned."""
    named = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return isinstance(statement, ast.Expr) and named.isdisjoint((*values, "_base_"))


def _value(node: ast.expr, values: Mapping[str, Any], base: Mapping[str, Any]) -> Any:
    """What an expression is, computed here; `NotRead` where it is more than data."""
    try:
        return _computed(node, values, base)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError, OverflowError, RecursionError):
        return NotRead(ast.unparse(node))


def _computed(node: ast.expr, values: Mapping[str, Any], base: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.List):
        return [_value(entry, values, base) for entry in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(entry, values, base) for entry in node.elts)
    if isinstance(node, ast.Dict):
        return _dictionary(node.keys, node.values, values, base)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        keys = [None if word.arg is None else ast.Constant(word.arg) for word in node.keywords]
        return _dictionary(keys, [word.value for word in node.keywords], values, base)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_computed(node.operand, values, base)
    if isinstance(node, ast.BinOp) and type(node.op) in _SUMS:
        return _sum(node.op, _computed(node.left, values, base), _computed(node.right, values, base))
    if isinstance(node, ast.Subscript):
        return _computed(node.value, values, base)[_computed(node.slice, values, base)]
    if isinstance(node, ast.Attribute):
        return base[node.attr] if ast.unparse(node.value) == "_base_" else _computed(node.value, values, base)[node.attr]
    raise ValueError(type(node).__name__)


def _dictionary(
    keys: Sequence[ast.expr | None], entries: Sequence[ast.expr], values: Mapping[str, Any], base: Mapping[str, Any]
) -> dict[Any, Any]:
    """The settings of `{...}` or `dict(...)`. An entry without a key is unpacked (`**other`)."""
    made: dict[Any, Any] = {}
    for key, entry in zip(keys, entries, strict=True):
        if key is None:
            made |= _computed(entry, values, base)
        else:
            made[_computed(key, values, base)] = _value(entry, values, base)
    return made


def _sum(kind: ast.operator, left: Any, right: Any) -> Any:
    """A sum, but no text or list of any size that the file chooses."""
    if isinstance(kind, ast.Mult) and not all(isinstance(side, int | float) and abs(side) < 1e9 for side in (left, right)):
        raise ValueError("a product of something else than numbers")
    if isinstance(left, NotRead) or isinstance(right, NotRead):
        raise ValueError("a sum with something that was not read")
    result = _SUMS[type(kind)](left, right)
    if isinstance(result, str | list | tuple) and len(result) > LARGEST_CONFIG:
        raise ValueError("too large")
    return result

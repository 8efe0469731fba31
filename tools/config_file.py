"""`--config FILE` and `--print-config`: all options of a command in one file, for `train` and `upcycle`.

    upcycle3d train small --data data --out run --print-config > run.yaml      every option, the whole preset included
    upcycle3d train --config run.yaml --out other --seed 1                     options on the command line win over the file
    upcycle3d train small --config learning_rate.yaml --data data --out run    a file may hold a few options only, over a preset

Read next: `console.py`, which parses the other words with the file's values as defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ..core.config_json import Json, config_to_json, fields_from_json
from ..core.errors import InvalidInput
from ..core.foreign_text import shown
from ..core.yaml_text import read_yaml, yaml_text

NOT_STORED = ("config", "print_config")
"""Options that say where the others come from."""


@dataclass(frozen=True, kw_only=True)
class FileDefaults:
    """What a configuration file makes of a command line."""

    default: Any
    """The options of the command, with `tyro.MISSING` where a required one is not in the file."""
    words: tuple[str, ...]
    """The words that are left."""


def defaults_of_file(make: type[Any], words: Sequence[str]) -> FileDefaults | None:
    """Take `--config FILE`, and the preset before it, out of the words of a command.

    Args:
        make: The options class of the command.
        words: Words of the command line.

    Returns:
        The values of the file as defaults, and the other words; None where the command has no such option or it is not given.

    Raises:
        InvalidInput: The file cannot be read, names an unknown option or holds a wrong value, or there is no such preset.
    """
    if not dataclasses.is_dataclass(make) or "config" not in {field.name for field in dataclasses.fields(make)}:
        return None
    left, path = _without_config(words)
    if path is None:
        return None
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise InvalidInput(f"{path} must hold names and values of options, found {shown(type(data).__name__)}")
    for name in NOT_STORED:
        if name in data:
            raise InvalidInput(f"{path} cannot hold the option `{name}`; it belongs on the command line")
    if isinstance(data.get("preset"), str):
        raise InvalidInput(
            f"{path} holds a preset by its name; leave it out, and name it before the options, as in `small --config {path}`"
        )
    base: dict[str, Json] = {}
    if left and not left[0].startswith("-"):
        base = {"preset": config_to_json(_preset(left[0]))}
        left = left[1:]
    elif "preset" not in data:
        raise InvalidInput(f"{path} holds no `preset`; name one before the options, as in `small --config {path}`")
    try:
        values = fields_from_json(make, _merged(base, data))
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
    required = {f.name: tyro.MISSING for f in dataclasses.fields(make) if f.default is dataclasses.MISSING}
    return FileDefaults(default=make(**required | values | {"config": path}), words=tuple(left))


def print_config(config: Any) -> None:
    """Print all options of a command as YAML, as `--config` reads them.

    Args:
        config: The options.
    """
    values = {name: value for name, value in config_to_json(config).items() if name not in NOT_STORED}
    sys.stdout.write(yaml_text(values))


def _without_config(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """The words without `--config FILE`, and the file."""
    left: list[str] = []
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != "--config":
            left.append(word)
            continue
        value = value if equals else next(rest, "")
        if not value or (not equals and value.startswith("-")):
            raise InvalidInput("--config takes the name of a YAML or JSON file; `--print-config` prints one")
        found.append(value)
    if len(found) > 1:
        raise InvalidInput(f"--config is given {len(found)} times; one file holds all options")
    return left, Path(found[0]) if found else None


def _preset(name: str) -> Any:
    from ..perception.recipes.presets import PRESETS

    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InvalidInput(f"there is no preset {shown(repr(name), most=80)}{hint} The presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def _merged(base: Mapping[str, Json], over: Mapping[str, Json]) -> dict[str, Json]:
    """The values of `over`, and those of `base` that it does not name. A part of another `kind` is replaced as a whole."""
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and value.get("kind", before.get("kind")) == before.get("kind"):
            merged[key] = _merged(before, value)
        else:
            merged[key] = value
    return merged

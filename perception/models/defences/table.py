"""The defences that there are, and how a command line spells them. A new one adds one line here.

A defence is written as its name and the fields that differ from their defaults, as in `region:margin_cells=2,background_share=0.1`.
Several are joined by `+`, as in `region+noise:sigma=0.1`; `none` is no defence. What `describe_defences` writes, `parse_defences` reads.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import get_args

from ....core.config_json import config_to_json
from ....core.errors import InvalidInput
from ....core.foreign_text import shown
from .bottleneck import BottleneckConfig
from .cells import DecoyConfig, DropConfig, JitterConfig
from .noise import NoiseConfig, RoundingConfig
from .obfuscator import ObfuscatorConfig
from .region import RegionConfig

DefenceConfig = (
    RegionConfig | DropConfig | JitterConfig | DecoyConfig | NoiseConfig | RoundingConfig | BottleneckConfig | ObfuscatorConfig
)
"""Every defence that an encoder file may hold. `config.build(spec)` makes it."""


def defence_name(config: type[DefenceConfig]) -> str:
    """Name a kind of defence as the command line does.

    Args:
        config: Its configuration.

    Returns:
        The name: `region` for `RegionConfig`.
    """
    return config.__name__.removesuffix("Config").lower()


def parse_defence(text: str) -> DefenceConfig:
    """Read a defence from a command line.

    Args:
        text: A name, and fields with values after a colon: `noise` or `noise:sigma=0.2`.

    Returns:
        Its configuration.

    Raises:
        InvalidInput: There is no such defence or field, or a value cannot be used.

    Example:
        >>> parse_defence("drop:share=0.5")
        DropConfig(share=0.5)
    """
    name, _, settings = text.partition(":")
    kinds = {defence_name(kind): kind for kind in get_args(DefenceConfig)}
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(kinds)}"
        raise InvalidInput(f"there is no defence {shown(name, most=80)!r}; {hint}")
    kind = kinds[name]
    known: dict[str, type[int] | type[float]] = {f.name: int if f.type == "int" else float for f in fields(kind)}
    values: dict[str, float] = {}
    for setting in filter(None, settings.split(",")):
        field, _, value = setting.partition("=")
        field = field.strip().replace("-", "_")
        if field not in known:
            raise InvalidInput(f"the defence {name} has no setting {shown(field, most=80)!r}; it has {', '.join(known)}")
        if field in values:
            raise InvalidInput(f"the defence {name} is given {field} twice; give it once")
        try:
            values[field] = known[field](value)
        except ValueError as error:
            wanted = "a whole number" if known[field] is int else "a number"
            raise InvalidInput(f"{name}:{field} needs {wanted}, found {shown(value, most=80)!r}") from error
    return kind(**values)  # type: ignore[arg-type]


def parse_defences(text: str) -> tuple[DefenceConfig, ...]:
    """Read several defences from a command line.

    Args:
        text: Defences in order, joined by `+`, as `describe_defences` writes them; `none` for no defence. Spaces around `+` are allowed.

    Returns:
        Their configurations.

    Raises:
        InvalidInput: There is no such defence or field, or a value cannot be used.

    Example:
        >>> parse_defences("drop:share=0.5+jitter:cells=2")
        (DropConfig(share=0.5), JitterConfig(cells=2, voxels=4, share=0.5))
    """
    return () if text.strip() == "none" else tuple(parse_defence(part.strip()) for part in text.split("+"))


def describe_defences(configs: Sequence[DefenceConfig]) -> str:
    """Write defences so that people and `parse_defences` can read them.

    Args:
        configs: The defences in order.

    Returns:
        Names with the settings that differ from the defaults, joined by `+`; `none` without a defence.

    Example:
        >>> describe_defences([RegionConfig(recall=0.9), NoiseConfig()])
        'region:recall=0.9+noise'
    """
    return "+".join(map(_described, configs)) or "none"


def _described(config: DefenceConfig) -> str:
    values = config_to_json(config)
    own = ",".join(f"{f.name}={_written(values[f.name])}" for f in fields(config) if values[f.name] != f.default)
    return defence_name(type(config)) + (f":{own}" if own else "")


def _written(value: float) -> str:
    """A number as people write it, with all digits that it needs and without the `+` that separates defences."""
    short = f"{value:g}"
    return (short if float(short) == value and isinstance(value, float) else repr(value)).replace("e+", "e")

"""`upcycle3d completion bash|zsh|fish`: a script that completes every command, preset, option and choice.

The script is text that needs no Python when a key is pressed. Read next: `completion_scripts.py`, which writes it.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Literal, get_type_hints

import tyro

from .arguments import words_of
from .completion_scripts import SCRIPTS, CompletedCommand
from .console import print_warning, run_command
from .main import COMMANDS


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """Print a completion script. It knows the commands of this version: print it again after an update."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """For bash: `upcycle3d completion bash > ~/.local/share/bash-completion/completions/upcycle3d`. For zsh: write it to a file that `.zshrc`
    sources after `compinit`. For fish: `upcycle3d completion fish > ~/.config/fish/completions/upcycle3d.fish`."""


def command(config: CompletionOptions) -> None:
    """Print a script that completes commands and options in a shell."""
    commands = [_completed(name) for name in COMMANDS]
    sys.stdout.write(SCRIPTS[config.shell](commands))


def _completed(name: str) -> CompletedCommand:
    module_name, summary = COMMANDS[name]
    try:
        module = importlib.import_module(f".{module_name}", __package__)
    except ImportError as error:
        print_warning(f"the options of {name} are not completed, because a package is missing: {error}")
        return CompletedCommand(name=name, summary=summary, kinds=(), options=(), choices={})
    kind = getattr(module, "ARGUMENTS", None)
    if kind is None:
        (kind,) = (hint for key, hint in get_type_hints(module.command, include_extras=True).items() if key != "return")
    words = words_of(kind, f"upcycle3d {name}")
    return CompletedCommand(name=name, summary=summary, kinds=words.kinds, options=words.options, choices=words.choices)


if __name__ == "__main__":
    sys.exit(run_command(command))

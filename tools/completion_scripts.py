"""Completion scripts of three shells, from one list of commands. Files are completed where nothing else is expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CompletedCommand:
    """A command and its words."""

    name: str
    """One word or two."""
    summary: str
    """What it does, in one line."""
    kinds: tuple[str, ...]
    """Words that come before the options, such as presets."""
    options: tuple[str, ...]
    """Options with their dashes."""
    choices: Mapping[str, tuple[str, ...]]
    """Values of the options that take one of a few."""


def bash_script(commands: Sequence[CompletedCommand]) -> str:
    """Write the script of bash.

    Args:
        commands: All commands.

    Returns:
        The script.
    """
    first = dict.fromkeys(command.name.split()[0] for command in commands)
    second: dict[str, list[str]] = {}
    for command in commands:
        one, _, two = command.name.partition(" ")
        if two:
            second.setdefault(one, []).append(two)
    lines = [
        "# Completion of upcycle3d for bash; zsh uses it too.",
        "_upcycle3d() {",
        '    local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" name="${COMP_WORDS[1]}" at=2 words=""',
        '    case "${COMP_WORDS[1]} ${COMP_WORDS[2]}" in',
        *(f'        "{c.name}") name="{c.name}"; at=3 ;;' for c in commands if " " in c.name),
        "    esac",
        '    if [ "$COMP_CWORD" -lt "$at" ]; then name="${COMP_WORDS[1]}"; at=2; fi  # the second word is not finished',
        '    if [ "$COMP_CWORD" -eq 1 ]; then',
        f'        words="{" ".join(first)} --help --version"',
        "    else",
        '        case "$name $prev" in',
        *(
            f'            "{c.name} {option}") words="{" ".join(values)}" ;;'
            for c in commands
            for option, values in c.choices.items()
        ),
        "        esac",
        '        if [ -z "$words" ]; then',
        '            if [ "$COMP_CWORD" -eq "$at" ]; then',
        '                case "$name" in',
        *(f'                    "{c.name}") words="{" ".join(c.kinds)}" ;;' for c in commands if c.kinds),
        "                esac",
        "            fi",
        '            if [ "$COMP_CWORD" -eq 2 ]; then',
        '                case "$name" in',
        *(f'                    "{one}") words="$words {" ".join(rest)}" ;;' for one, rest in second.items()),
        "                esac",
        "            fi",
        '            case "$name" in',
        *(f'                "{c.name}") words="$words {" ".join(c.options)}" ;;' for c in commands),
        "            esac",
        "        fi",
        "    fi",
        '    COMPREPLY=( $(compgen -W "$words" -- "$cur") )',
        "}",
        "complete -o default -F _upcycle3d upcycle3d",
        "",
    ]
    return "\n".join(lines)


def zsh_script(commands: Sequence[CompletedCommand]) -> str:
    """Write the script of zsh, which is that of bash behind zsh's own adapter.

    Args:
        commands: All commands.

    Returns:
        The script.
    """
    return "autoload -U +X bashcompinit && bashcompinit\n" + bash_script(commands)


def fish_script(commands: Sequence[CompletedCommand]) -> str:
    """Write the script of fish.

    Args:
        commands: All commands.

    Returns:
        The script.
    """
    lines = [
        "# Completion of upcycle3d for fish.",
        "function __upcycle3d_at",
        "    # Whether the words so far begin with the first argument, and not with one of the others: `export` is not `export onnx`.",
        "    set -l words (commandline -opc)",
        "    set -e words[1]",
        "    set -l length (count (string split ' ' -- $argv[1]))",
        "    test (count $words) -ge $length; or return 1",
        '    test "$words[1..$length]" = "$argv[1]"; or return 1',
        '    test (count $words) -ge 2; and contains -- "$words[1..2]" $argv[2..-1]; and return 1',
        "    return 0",
        "end",
        "function __upcycle3d_next",
        "    # Whether this many words came before.",
        "    test (count (commandline -opc)) -eq $argv[1]",
        "end",
        "complete -c upcycle3d -n '__upcycle3d_next 1' -f -l help",
        "complete -c upcycle3d -n '__upcycle3d_next 1' -f -l version",
    ]
    for command in commands:
        one, _, two = command.name.partition(" ")
        longer = " ".join(f'"{c.name}"' for c in commands if not two and c.name.startswith(f"{one} "))
        here = f'__upcycle3d_at "{command.name}" {longer}'.rstrip()
        place = "__upcycle3d_next 1" if not two else f'__upcycle3d_next 2; and __upcycle3d_at "{one}"'
        lines.append(f"complete -c upcycle3d -n '{place}' -f -a {two or one} -d {_quoted(command.summary)}")
        for kind in command.kinds:
            after = len(command.name.split()) + 1
            lines.append(f"complete -c upcycle3d -n '__upcycle3d_next {after}; and {here}' -f -a {kind}")
        for option in command.options:
            values = command.choices.get(option)
            takes = f" -x -a {_quoted(' '.join(values))}" if values else ""
            lines.append(f"complete -c upcycle3d -n '{here}' -l {option.removeprefix('--')}{takes}")
    # A group such as `moe`, which is no command itself, is listed once.
    groups = dict.fromkeys(c.name.split()[0] for c in commands if " " in c.name) | dict.fromkeys(
        c.name for c in commands if " " not in c.name
    )
    known = {c.name for c in commands}
    lines += [f"complete -c upcycle3d -n '__upcycle3d_next 1' -f -a {name}" for name in groups if name not in known]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS: Mapping[str, Callable[[Sequence[CompletedCommand]], str]] = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}
"""How the script of each shell is written."""

"""Completion scripts complete what the parser takes, in the shells themselves where they are installed."""

import shutil
import subprocess
from typing import get_type_hints

import pytest

from upcycle3d.tools import completion, extract, prepare
from upcycle3d.tools.arguments import words_of
from upcycle3d.tools.completion_scripts import CompletedCommand, bash_script, fish_script, zsh_script
from upcycle3d.tools.console import run_command
from upcycle3d.tools.main import COMMANDS


def made(name: str, *options: str, kinds: tuple[str, ...] = (), **choices: tuple[str, ...]) -> CompletedCommand:
    of = {f"--{option}": values for option, values in choices.items()}
    return CompletedCommand(name=name, summary=f"it's {name}", kinds=kinds, options=(*options, *of), choices=of)


TREE = [
    made("export", "--detector", "--out"),
    made("export onnx", "--detector", "--scans"),
    made("moe serve", "--port"),
    made("train", "--out", kinds=("small", "kitti_small"), log=("wandb", "none")),
]
LINES = [
    ("upcycle3d ", {"export", "moe", "train"}),
    ("upcycle3d ex", {"export"}),
    ("upcycle3d export o", {"onnx"}),
    ("upcycle3d export onnx", {"onnx"}),
    ("upcycle3d export --", {"--detector", "--out"}),
    ("upcycle3d export onnx --", {"--detector", "--scans"}),
    ("upcycle3d moe ", {"serve"}),
    ("upcycle3d train s", {"small"}),
    ("upcycle3d train small --l", {"--log"}),
    ("upcycle3d train small --log ", {"wandb", "none"}),
]


def test_bash_completes_the_tree(tmp_path):
    calls = "\n".join(f"t {line}{' ' + chr(39) * 2 if line.endswith(' ') else ''}" for line, _ in LINES)
    ask = 't() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _upcycle3d; echo "${COMPREPLY[*]}"; }'
    script = f"{bash_script(TREE)}\n{ask}\n{calls}\n"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for (line, wanted), said in zip(LINES, done.stdout.splitlines(), strict=True):
        assert wanted <= set(said.split()), line
        assert len(wanted) >= len([word for word in said.split() if not word.startswith("--")]), line


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not on this machine")
def test_fish_completes_the_tree(tmp_path):
    path = tmp_path / "upcycle3d.fish"
    path.write_text(fish_script(TREE))
    for line, wanted in LINES:
        done = subprocess.run(["fish", "-c", f"source {path}; complete -C '{line}'"], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert wanted <= {said.split("\t")[0] for said in done.stdout.splitlines()}, line


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not on this machine")
def test_zsh_accepts_its_script(tmp_path):
    path = tmp_path / "upcycle3d.zsh"
    path.write_text(zsh_script(TREE))
    code = f"autoload -Uz compinit; compinit -u -D; source {path}; print -r -- $_comps[upcycle3d]"
    done = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, check=True)
    assert "_upcycle3d" in done.stdout


def test_words_are_those_of_the_parser():
    words = words_of(extract.Extract, "upcycle3d extract")
    assert {"--detector", "--z-shift", "--json", "--help"} <= set(words.options)
    assert words.choices["--codec"] == ("fp16", "int8")
    assert "--json" not in words.choices
    layouts = words_of(get_type_hints(prepare.command, include_extras=True)["dataset"], "upcycle3d prepare")
    assert {"kitti", "folder", "lyft", "nuscenes", "waymo", "argoverse2", "bag"} <= set(layouts.kinds)
    assert words_of(completion.CompletionOptions, "upcycle3d completion").kinds == ("bash", "zsh", "fish")


def test_the_command_prints_a_script_and_names_what_it_cannot_load(monkeypatch, capsys):
    few = {name: COMMANDS[name] for name in ("doctor", "export onnx")} | {"moe serve": ("no_such_module", "serve")}
    monkeypatch.setattr(completion, "COMMANDS", few)
    assert run_command(completion.command, ["bash"], program="upcycle3d completion") == 0
    said = capsys.readouterr()
    assert "--repeats" in said.out
    assert "onnx" in said.out
    assert "the options of moe serve are not completed" in said.err

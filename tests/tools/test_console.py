"""The program's front door: mistakes become sentences, results become tables and JSON."""

import errno
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import types
import typing
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.foreign_text import shown
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.scan_options import ScanOptions
from upcycle3d.tools.console import (
    RENAMED_OPTIONS,
    _refuse_renamed,
    console,
    print_table,
    print_warning,
    progress_bar,
    run_command,
    warnings_so_far,
    write_json,
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Nothing to say."""

    steps: int = 1


def test_a_full_disk_or_path_is_named_and_nothing_else_is_hidden(capsys):
    def full(config: Arguments) -> None:
        """Write."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x")

    def missing(config: Arguments) -> None:
        """Read."""
        raise FileNotFoundError(errno.ENOENT, "no such file", "/data/[y]")

    def nameless(config: Arguments) -> None:
        """Read."""
        raise OSError("something else")

    assert run_command(full, []) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "disk is full" in error
    assert "/data/x" in error
    assert run_command(missing, []) == 2
    assert capsys.readouterr().err == "error: no such file: /data/[y]\n"
    assert run_command(nameless, []) == 2
    assert capsys.readouterr().err == "error: the system refused to read or write: something else\n"


def test_warnings_of_a_command_are_kept_for_its_file_and_forgotten_by_the_next():
    def warns(config: Arguments) -> None:
        """Warn."""
        print_warning(f"{config.steps} is odd")
        assert warnings_so_far() == [f"{config.steps} is odd"]

    assert run_command(warns, ["--steps", "3"]) == 0
    assert run_command(warns, ["--steps", "5"]) == 0


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What most commands have."""

    out: Path = Path("out")
    json: Path | None = None
    seed: int = 0
    seeds: tuple[int, ...] = (0,)


def test_places_that_cannot_be_written_and_impossible_seeds_are_refused_before_the_work(capsys, tmp_path, monkeypatch):
    worked = []

    def works(config: Outputs) -> None:
        """Work."""
        worked.append(config)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for words, message in (
        (["--json", "/"], "--json takes the name of a file, and / is a folder"),
        (["--json", "."], "--json takes the name of a file, and . is a folder"),
        (["--json", "file/x.json"], "is not a folder"),
        (["--out", "/"], "--out must be a folder of its own"),
        (["--seed", "-5"], "a seed must be a whole number from 0 to 9223372036854775807, found -5"),
        (["--seed", str(2**64)], "found 18446744073709551616"),
        (["--seeds", "0", "-1"], "found -1"),
    ):
        assert run_command(works, words) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not worked
    for words in (["--json", "new/folder/x.json"], ["--json", "file"], ["--json", "/dev/stdout"], ["--seed", str(2**63 - 1)]):
        assert run_command(works, words) == 0
    assert len(worked) == 4


def test_brackets_in_a_message_survive(capsys):
    def fails(config: Arguments) -> None:
        """Fail."""
        raise InvalidInput("expected [batch, z, y, x]")

    assert run_command(fails, []) == 2
    assert "[batch, z, y, x]" in capsys.readouterr().err


HOSTILE = (
    "\\[/x]",
    "[/x]",
    "[bold]",
    "a\x1b[2Jb",
    "\x1b]0;title\x07",
    "\u202eevil",
    ":smile:",
    "two\nlines",
    "\udcff",
    "[link=x]",
    "\x9b31m",
)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_text_of_others_is_printed_as_it_is_without_control_characters(text, capsys, monkeypatch):
    # A test process cannot send the half of a surrogate pair to the process that reports, so pytest may not log it.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def fails(config: Arguments) -> None:
        """Show a hostile text everywhere."""
        print_table(f"title {text}", (f"column {text}", "b"), [(text, Path("/data") / text)])
        console.print(f"line {text}")
        print_warning(f"warned of {text}")
        warnings.warn(f"python warned of {text}", UserWarning, stacklevel=2)
        logging.getLogger("some.library").warning("logged %s", text)
        with progress_bar(f"work on {text}", 1) as advance:
            advance(1, 1)
        raise InvalidInput(f"cannot read {text}")

    assert run_command(fails, []) == 2
    out, err = capsys.readouterr()
    for stream in (out, err):
        assert all(c == "\n" or unicodedata.category(c)[0] != "C" for c in stream)
    wanted = "\n  ".join(shown(line) for line in text.split("\n"))
    assert f"error: cannot read {wanted}\n" in err
    assert f"warning: warned of {wanted}\n" in err
    assert f"warning: python warned of {wanted}\n" in err
    assert all(line[:8] in ("error: c", "warning:", "  lines") for line in err.splitlines())
    for line in text.split("\n"):
        assert out.count(shown(line)) >= 5  # title, column, two cells, line, progress


def test_a_warning_is_one_sentence_without_a_file_and_is_printed_once(capsys):
    def warns(config: Arguments) -> None:
        """Warn as a reader does for every file."""
        for _ in range(3):
            warnings.warn("the intensity reaches 255", UserWarning, stacklevel=1)
        warnings.warn("the intensity reaches 255", UserWarning, stacklevel=1)

    assert run_command(warns, []) == 0
    assert capsys.readouterr().err == "warning: the intensity reaches 255\n"


def test_an_error_that_nobody_foresaw_is_a_sentence_and_its_details_are_kept(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def breaks(config: Arguments) -> None:
        """Break."""
        raise KeyError("velodyne")

    assert run_command(breaks, []) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "KeyError: 'velodyne'" in err
    (details,) = tmp_path.iterdir()
    assert str(details) in err
    assert "Traceback" in details.read_text()


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "run", "--help"], ["doctor", "--repeats", "0"], ["adapt"]])
def test_a_reader_that_goes_away_is_no_error(arguments):
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "upcycle3d.tools.main", *arguments], stdout=writes, stderr=subprocess.PIPE, text=True
    )
    os.close(writes)
    assert done.stderr == ""
    assert done.returncode == 0


def test_options_reach_the_command():
    seen = []

    def command(config: Arguments) -> None:
        """Look."""
        seen.append(config.steps)

    assert run_command(command, ["--steps", "7"]) == 0
    assert seen == [7]


def test_json_is_written_whole(tmp_path: Path):
    write_json(tmp_path / "new" / "result.json", {"ap": 1.5})
    write_json(None, {"ap": 1.5})
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == {"ap": 1.5}


def test_progress_without_a_terminal_is_a_few_lines(capsys):
    with progress_bar("work", 200) as advance:
        for i in range(200):
            advance(i + 1, 200)
    lines = capsys.readouterr().out.splitlines()
    assert 5 <= len(lines) <= 12
    assert lines[-1] == "work: 200 of 200"
    assert all(line.endswith(" left") for line in lines[:-1])


def test_progress_says_how_long_the_rest_takes(capsys, monkeypatch):
    clock = iter([100.0, 110.0, 200.0])
    monkeypatch.setattr("upcycle3d.tools.console.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with progress_bar("work", 40) as advance:
        advance(1, 40)
        advance(20, 40)
    assert capsys.readouterr().out.splitlines() == ["work: 1 of 40, 6 min 30 s left", "work: 20 of 40, 1 min 40 s left"]


def test_a_table_of_nothing_is_legal(capsys):
    print_table("empty", ("a", "b"), [])
    assert "empty" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--version"], 0, "upcycle3d"),
        (["--help"], 0, "extract"),
        (["trian"], 2, "'trian'; did you mean 'train'? Commands: demo,"),
        (["xyz"], 2, "'xyz'. Commands: demo,"),
        (["adapt", "--help"], 0, "adapt detector"),  # two commands begin with this word
        (["adapt", "fetures"], 2, "'adapt fetures'; did you mean 'adapt features'?"),
        (["export", "onx"], 2, "'export onx'; did you mean 'export onnx'?"),
        (["export", "--help"], 0, "upcycle3d export aoti"),  # a command itself, and the first word of others
    ],
)
def test_the_program_knows_its_commands(arguments, code, text):
    done = subprocess.run([sys.executable, "-m", "upcycle3d.tools.main", *arguments], capture_output=True, text=True)
    assert done.returncode == code
    assert text in done.stdout + done.stderr


def test_a_command_can_be_run_as_a_module():
    done = subprocess.run([sys.executable, "-m", "upcycle3d.tools.inspect", "/nowhere"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: there is nothing at /nowhere\n")


@pytest.mark.parametrize(
    ("module", "arguments", "text"),
    [
        (
            "train",
            ["kitti_smal", "--data", "x", "--out", "y"],
            "has no preset 'kitti_smal' (did you mean kitti_small?); the presets are small,",
        ),
        ("upcycle", ["xyz", "--data", "x"], "has no preset 'xyz'; the presets are small,"),
        ("import_weights", ["openpcdet", "f.pth", "kitti_pvrcnn", "--out", "y"], "'kitti_pvrcnn' (did you mean kitti_pv_rcnn?)"),
        ("experiment_upcycling", ["dmo", "--out", "y"], "has no preset 'dmo' (did you mean demo?)"),
        ("evaluate", ["kiti"], "has no kind 'kiti' (did you mean kitti?); the kinds are kitti, waymo, lyft, run"),
        ("train", ["kitti_small", "--data", "x", "--out", "y", "--stpes", "5"], "no option --stpes (did you mean --steps?)"),
        ("train", ["--data", "x", "kitti_small"], "takes the preset first, before any option: one of small,"),
        ("view", ["--dta", "x", "--uot=y"], "no option --dta (did you mean --data?) and --uot (did you mean --out?)"),
        ("doctor", ["--\x1b[2J"], "\\x1b[2J"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest_right_one(module, arguments, text, capsys):
    found = importlib.import_module(f"upcycle3d.tools.{module}")
    parsed_as = getattr(found, "ARGUMENTS", None)
    assert run_command(found.command, arguments, program="upcycle3d x", parsed_as=parsed_as) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "\x1b" not in error
    assert len(error.splitlines()) < 8
    assert "upcycle3d kitti_" not in error  # a command that does not exist


OLD_OPTIONS = [(module, old, new) for module, options in RENAMED_OPTIONS.items() for old, new in options.items()]


@pytest.mark.parametrize(("module", "old", "new"), OLD_OPTIONS, ids=[f"{module} {old}" for module, old, _ in OLD_OPTIONS])
def test_an_option_of_version_0_1_is_answered_with_what_to_write_now(module, old, new, capsys):
    command = importlib.import_module(f"upcycle3d.tools.{module}").command
    name, *values = old.split()
    words = [[name, *values]] if values else [[name, "7"], [f"{name}=7"], [name.replace("-", "_").replace("__", "--", 1), "7"]]
    for arguments in words:
        assert run_command(command, arguments) == 2
        assert f"has no option {old} any more; write {new}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("demo", ["second_iou"]),
        ("adapt", ["features.npz", "--out", "x"]),
        ("adapt_detector", ["--source", "a:train", "--target", "b:val"]),
        ("adapt_detector", ["--source=a:train", "--target", "b:val", "--out", "x"]),
    ],
)
def test_what_is_written_now_is_not_taken_for_an_old_option(module, arguments):
    _refuse_renamed(module, arguments)


@pytest.mark.parametrize("new", sorted({new.split()[0] for _, _, new in OLD_OPTIONS}))
def test_the_new_name_of_an_option_exists(new):
    """The named option is a field of its command, or of a dataclass below it."""
    for module, options in RENAMED_OPTIONS.items():
        if not any(new == written.split()[0] for written in options.values()):
            continue
        found = importlib.import_module(f"upcycle3d.tools.{module}")
        (kind,) = [t for n, t in get_type_hints(found.command).items() if n != "return"]
        kinds = typing.get_args(kind) or (kind,)
        kinds = (*kinds, *(ScanOptions for k in kinds if ScanOptions in get_type_hints(k).values()))  # they are flat options
        for part in new.removeprefix("--").replace("-", "_").split("."):
            flat = [kind for k in kinds for kind in get_type_hints(k).values() if kind is ScanOptions]  # options without a prefix
            kinds = [get_type_hints(k)[part] for k in (*kinds, *flat) if part in get_type_hints(k)]
            assert kinds, (module, new)


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Options that take an intensity scale, alone or of a rig."""

    intensity_scale: float = 1.0
    rig: RigSpec = RigSpec()
    name: str = ""


@pytest.mark.parametrize(
    "words",
    [
        ["--intensity-scale", "1/255", "--rig.intensity-scale", "1/255"],
        ["--intensity-scale=1/255", "--rig.intensity-scale=1.0/255"],
        ["--intensity_scale", "1/255", "--rig.intensity_scale=1/255"],
        ["--intensity-scale", repr(1 / 255), "--rig.intensity-scale", repr(1 / 255), "--name", "1/255"],
    ],
)
def test_an_intensity_scale_may_be_a_fraction_in_every_command(words):
    found = []

    def keep(config: Scales) -> None:
        """Keep."""
        found.append(config)

    assert run_command(keep, words) == 0
    assert found[0].intensity_scale == found[0].rig.intensity_scale == 1 / 255
    assert found[0].name == ("1/255" if "--name" in words else "")


@pytest.mark.parametrize("value", ["1/0", "1/x", "/", "1/2/3"])
def test_a_fraction_without_a_value_is_refused(value, capsys):
    def nothing(config: Scales) -> None:
        """Do nothing."""

    assert run_command(nothing, ["--intensity-scale", value]) == 2
    assert f"--intensity-scale takes a number or a fraction such as 1/255, found {value}" in capsys.readouterr().err


def test_a_group_of_options_that_is_refused_is_named_without_the_parsers_own_names(capsys):
    from upcycle3d.tools import train

    words = ["kitti_small", "--data", "d", "--out", "o", "--preset.train.loop.optim.lr", "1e20"]
    code = run_command(train.command, words, parsed_as=train.ARGUMENTS)
    said = " ".join(capsys.readouterr().err.split())
    assert code == 2
    assert said.startswith("error: a learning rate of 1e+20 is absurd")
    assert "dummy" not in said

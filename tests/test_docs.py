"""What the documents show works: code runs, commands parse, files exist, links lead somewhere.

Every fault names page and line. `docs/history.md` is left out where it names commands and files: it tells of programs that are gone.
"""

import contextlib
import dataclasses
import importlib
import io
import re
import shlex
import subprocess
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import pytest
import tyro

import tiny
from upcycle3d.core.point_files import write_bin
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.perception.recipes.presets import PRESETS
from upcycle3d.perception.training.detector_files import save_detector
from upcycle3d.tools.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
ALL_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in ALL_PAGES if page.name != "history.md"]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=_name)


# ---- reading a page


class Text(NamedTuple):
    """A piece of a page."""

    page: str
    """The page, relative to the repository."""
    line: int
    """Number of its first line."""
    text: str
    """The code."""
    fence: str | None = None
    """Language of the code block that the piece lies in; None for code in a sentence."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Text]:
    """The code blocks of a page, with the line number of their first line."""
    found, text = [], page.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        found.append(Text(_name(page), text[: match.start(2)].count("\n") + 1, match[2], match[1]))
    return found


def spans(page: Path) -> list[Text]:
    """The code in sentences and tables of a page; line breaks in it become spaces."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    text = re.sub(r"^```.*?^```$", blank, page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = []
    for match in re.finditer(r"`((?:[^`\n]|\n(?!\n))+)`", text):
        found.append(Text(_name(page), text[: match.start()].count("\n") + 1, " ".join(match[1].split())))
    return found


def command_lines(page: Path) -> Iterator[Text]:
    """Commands in code blocks, each on one line without its comment, and those in sentences."""
    for block in blocks(page):
        if block.fence in ("", "bash", "console"):
            lines, joined, first = block.text.splitlines(), "", 0
            for number, line in enumerate(lines):
                first = first if joined else number
                joined += line.removesuffix("\\")
                if not line.endswith("\\"):
                    if re.match(r"([A-Z_]+=\S+ )?(upcycle3d|python3?|pytest|torchrun) ", joined):
                        yield block._replace(line=block.line + first, text=" ".join(shlex.split(joined, comments=True)))
                    joined = ""
    yield from spans(page)


def programs(page: Path) -> list[tuple[Text, str, list[str]]]:
    """(where, command, words after it) for each `upcycle3d …` and each command of this program that stands alone, as in `extract --scans`."""
    found = []
    for place in command_lines(page):
        for part in re.split(r"\s&&\s|\s\|\s|; ", place.text):
            words = part.split()
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                del words[0]
            if "-m" in words and words[words.index("-m") + 1].startswith("upcycle3d.tools."):
                words = ["upcycle3d", words[words.index("-m") + 1].rpartition(".")[2], *words[words.index("-m") + 2 :]]
            named = words[:1] == ["upcycle3d"]
            if named:
                words = words[1:]
            if not words or (named and (words[0].isupper() or words[0].startswith("-"))):  # `upcycle3d COMMAND --help`
                continue
            name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
            if named or (place.fence is None and name in COMMANDS and any(word.startswith("--") for word in words)):
                found.append((place, name, words[len(name.split()) :]))
    return found


# ---- what a command accepts


@cache
def options_of(command: str) -> frozenset[str]:
    """Every option of a command, for all its subcommands and presets."""
    module = importlib.import_module(f"upcycle3d.tools.{COMMANDS[command][0]}")
    hints = get_type_hints(module.command, include_extras=True)
    hints.pop("return", None)
    return frozenset(_options(*hints.values(), ())) | {"--help"}


def _options(hint: Any, prefix: tuple[str, ...]) -> Iterator[str]:
    """Options by the names that tyro gives them: fields of nested dataclasses are joined by dots."""
    *outer, name = ("", *prefix)
    if get_origin(hint) is Annotated:
        kind, *extras = get_args(hint)
        if any(isinstance(extra, tyro.constructors.PrimitiveConstructorSpec) for extra in extras):
            yield _option(outer, name)
            return
        for extra in extras:
            if getattr(extra, "constructor_factory", None):
                kind = extra.constructor_factory()
            if getattr(extra, "name", None) == "":
                prefix = prefix[:-1]
        yield from _options(kind, prefix)
    elif get_origin(hint) in (Union, types.UnionType, tuple):
        for part in get_args(hint):
            yield from _options(part, prefix)
    elif dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        for field in dataclasses.fields(hint):
            yield from _options(hints[field.name], (*prefix, field.name))
    elif name:
        yield _option(outer, name)
        if hint is bool:
            yield _option(outer, f"no_{name}")


def _option(outer: list[str], name: str) -> str:
    return "--" + ".".join([*outer[1:], name]).replace("_", "-")


def option_words(words: list[str]) -> list[str]:
    """The options among words, up to a `--`; places in tuples (`--thresholds.0.ignore`) are left out."""
    words = words[: words.index("--")] if "--" in words else words
    return [re.sub(r"\.\d+", "", word.partition("=")[0]) for word in words if re.match(r"--[a-z]", word)]


def parse_fault(command: str, words: list[str]) -> str | None:
    """What the command's own parser says against these words; None if it accepts them."""
    words = words[: words.index(">")] if ">" in words else words
    if "--config" in words:
        return None  # the file decides what is missing; `tests/tools/test_config_file.py` reads some
    module = importlib.import_module(f"upcycle3d.tools.{COMMANDS[command][0]}")
    kind: Any = getattr(module, "ARGUMENTS", None)
    options: dict[str, Any] = {"args": words}
    if kind is None:
        (kind,) = (hint for name, hint in get_type_hints(module.command, include_extras=True).items() if name != "return")
    else:  # only the preset that is named: a parser of all presets takes seconds to build
        settings = [
            extra for choice in get_args(kind) for extra in getattr(choice, "__metadata__", ()) if hasattr(extra, "default")
        ]
        defaults = {extra.name: extra.default for extra in settings}
        if not words or words[0] not in defaults:
            return f"there is no preset {words[:1]} among {', '.join(defaults)}"
        options = {"args": words[1:], "default": defaults[words[0]]}
        kind = type(defaults[words[0]])
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
        try:
            tyro.cli(kind, config=(tyro.conf.AvoidSubcommands,), **options)
        except SystemExit:
            return " ".join(re.sub(r"[│╭╮╰╯─]", " ", heard.getvalue()).split())[:300]
    return None


# ---- commands


@each_page
def test_commands_that_pages_name_exist(page):
    faults = [f"{place}: there is no command {name!r}" for place, name, _ in programs(page) if name not in COMMANDS]
    assert not faults, "\n".join(faults)


@each_page
def test_command_lines_in_code_blocks_are_accepted_by_the_programs_parser(page):
    faults = []
    for place, name, words in programs(page):
        if place.fence is not None and name in COMMANDS and "…" not in place.text:
            fault = parse_fault(name, words)
            faults += [f"{place}: {place.text}: {fault}"] if fault else []
    assert not faults, "\n".join(faults)


@each_page
def test_options_after_a_command_are_options_of_that_command(page):
    faults = []
    for place, name, words in programs(page):
        if name in COMMANDS:
            unknown = [option for option in option_words(words) if option not in options_of(name)]
            faults += [f"{place}: {name} has no option {option}" for option in unknown]
    assert not faults, "\n".join(faults)


OF_OTHER_PROGRAMS = {"--user", "--gpus", "--nproc-per-node", "--index-url", "--version"}


@each_page
def test_an_option_that_is_named_alone_belongs_to_some_command(page):
    known = set().union(*map(options_of, COMMANDS)) | OF_OTHER_PROGRAMS
    scripts = "".join(path.read_text() for path in (ROOT / "benchmarks").rglob("*.py"))
    faults = []
    for place in spans(page):
        if place.text.startswith("--"):
            unknown = [o for o in option_words(place.text.split()) if o not in known and not _has_option(scripts, o)]
            faults += [f"{place}: no command has the option {option}" for option in unknown]
    assert not faults, "\n".join(faults)


def _has_option(script: str, option: str) -> bool:
    """Whether the text of a script defines an option, with argparse or as the field of a dataclass."""
    return f'"{option}"' in script or re.search(rf"^    {option[2:].replace('-', '_')}: ", script, re.MULTILINE) is not None


@each_page
def test_python_scripts_that_pages_run_exist_and_have_the_options(page):
    faults = []
    for place in command_lines(page):
        for match in re.finditer(r"\b(?:python|pytest)3? ((?:[\w./-]+\.py ?)+)([^;&|]*)", place.text):
            for script in match[1].split():
                if not (ROOT / script).is_file():
                    faults.append(f"{place}: there is no {script}")
                else:
                    options = option_words(match[2].split())
                    faults += [
                        f"{place}: {script} has no {o}" for o in options if not _has_option((ROOT / script).read_text(), o)
                    ]
    assert not faults, "\n".join(faults)


# ---- files


@cache
def repository_files() -> frozenset[str]:
    """All files of the repository and their folders, relative to its root."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [Path(name) for name in names.stdout.splitlines()]
    return frozenset(str(path) for file in files for path in (file, *file.parents))


@each_page
def test_files_and_folders_that_pages_name_exist(page):
    """Names with a folder of this repository in front, and names of Python files and pages; NAME in capitals stands for any name."""
    faults = []
    for place in spans(page):
        name = place.text.rstrip("/")
        ours = name.partition("/")[0] in repository_files() and "/" in place.text
        if not re.fullmatch(r"[\w./-]+", name) or not (ours or name.endswith((".py", ".md"))) or re.search("[A-Z]{4}", name):
            continue
        if not any(file == name or file.endswith(f"/{name}") for file in repository_files()):
            faults.append(f"{place}: there is no {name}")
    assert not faults, "\n".join(faults)


OF_OTHERS = {"train_data", "train_lidar", "da_waymo_dataset", "gauss_lidar3", "obj_type", "psr", "centroid", "centroid_abs"}
"""Names in the data and code of others, which our code does not contain."""


@cache
def words_of_the_code() -> frozenset[str]:
    """All words in the Python files of the repository."""
    sources = [ROOT / name for name in repository_files() if name.endswith(".py")]
    return frozenset(word for path in sources if path.is_file() for word in re.findall(r"\w+", path.read_text()))


@each_page
def test_names_in_code_font_occur_in_the_code(page):
    """`SmashedScene`, `METHODS`, `box_weight`, `round_trip(features, codec)`: a name that was changed must change in the pages too."""
    faults = []
    for place in spans(page):
        if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", place.text):
            known = words_of_the_code() | OF_OTHERS
            faults += [
                f"{place}: {word} is not in the code"
                for word in re.findall(r"[A-Za-z_]\w+", place.text)
                if word not in known and not re.search("[A-Z]{4}", word)
            ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", ALL_PAGES, ids=_name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@each_page
def test_links_within_a_page_lead_to_a_heading(page):
    text = page.read_text()
    headings = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert [target for target in re.findall(r"\]\(#([^)]+)\)", text) if target not in headings] == []


# ---- Python

CODE = [block for page in PAGES for block in blocks(page) if block.fence == "python" and page.name != "CONTRIBUTING.md"]
RUN_BY_OTHER_TESTS = {
    "class ArgoverseLog": "tests/test_own_data_page.py",
    "GLCAdapter(": "tests/adapt/glc/test_adapter.py",
    "load_clip(": "tests/moe/test_hugging_face_clip.py",
    "load_language_model(": "tests/moe/test_language_commands.py",
    "upcycle_head(": "tests/recipes/test_upcycle_head.py",
    "upcycle3d.adapt(": "tests/adapt/detection/test_detector_command.py",
}
"""Blocks that need what those tests make; they read the page too."""


@pytest.mark.parametrize("block", CODE, ids=str)
def test_python_of_the_pages_runs(block, tmp_path, monkeypatch):
    for sign, test in RUN_BY_OTHER_TESTS.items():
        if sign in block.text:
            assert block.page in (ROOT / test).read_text()
            return
    monkeypatch.chdir(tmp_path)
    if "examples/detector.safetensors" in block.text:  # README: any detector and any scan
        save_detector("examples/detector.safetensors", tiny.second_iou())
        write_bin("scan.bin", tiny.scan_with_car())
    names: dict[str, Any] = {}
    exec(compile(block.text, str(block), "exec"), names)
    if "prepare_parking_lot" in names:
        train = names["prepare_parking_lot"](tmp_path / "prepared")
        assert isinstance(train, PreparedDataset)
        assert (len(train), len(train[0].points)) == (8, 2400)
        assert train[0].labels is not None
        assert int(train[0].labels.num_points[0]) >= 400


def test_the_dataset_of_the_data_format_page_is_short():
    (block,) = (block for block in CODE if block.page == "docs/data_format.md")
    assert len(block.text.splitlines()) <= 50


# ---- words


@pytest.mark.parametrize("page", ALL_PAGES, ids=_name)
def test_features_are_never_called_anonymous(page):
    text = page.read_text().lower()
    for match in re.finditer(r"anonymous|de-identified|anonymi[sz]ed", text):
        assert "not" in text[max(0, match.start() - 40) : match.start()], text[max(0, match.start() - 60) : match.end()]


@pytest.mark.parametrize("page", ALL_PAGES, ids=_name)
def test_no_page_waits_to_be_filled(page):
    for placeholder in ("RESULTS_TABLE", "_TABLE\n", "ABLATION\n", "SPEED\n", "To be filled", "TODO"):
        assert placeholder not in page.read_text(), placeholder


@each_page
def test_lines_of_sentences_have_at_most_140_characters(page):
    text = re.sub(r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert [
        f"{_name(page)}:{n}" for n, line in enumerate(text.splitlines(), 1) if len(line) > 140 and not line.startswith("|")
    ] == []


def test_the_page_of_presets_lists_every_preset_with_its_classes_and_steps():
    rows = {
        r[0]: r
        for r in re.findall(
            r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|.*\| ([\d,]+), ([\d,]+) \|$",
            (ROOT / "docs" / "presets.md").read_text(),
            re.MULTILINE,
        )
    }
    assert set(rows) == set(PRESETS)
    for name, (_, label, classes, train, upcycle) in rows.items():
        preset = PRESETS[name]
        assert label == preset.detector.label
        assert tuple(classes.split(", ")) == preset.detector.class_names
        steps = (preset.train.loop.optim.total_steps, preset.upcycle.loop.optim.total_steps)
        assert (int(train.replace(",", "")), int(upcycle.replace(",", ""))) == steps

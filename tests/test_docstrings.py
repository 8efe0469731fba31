"""What a reader may rely on: every public name is documented, in one style, and every configuration field explains itself."""

import ast
import re
from pathlib import Path

import pytest

import upcycle3d

ROOT = Path(upcycle3d.__file__).resolve().parent
FILES = sorted(path for part in ("core", "ops", "datasets", "perception", "tools") for path in (ROOT / part).rglob("*.py"))
# A command's options are documented by its `--help`, and its function takes them as one value.
NO_ARGS_BLOCK = {"command"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(name: str) -> bool:
    return not name.startswith("_")


def decorators(node: ast.AST) -> list[str]:
    return [ast.unparse(d) for d in getattr(node, "decorator_list", [])]


def is_dataclass(node: ast.ClassDef) -> bool:
    return any(d.split("(")[0].split(".")[-1] == "dataclass" for d in decorators(node))


def public_functions(tree: ast.Module) -> list[tuple[str, Function]]:
    """Module-level functions and methods of module-level classes, all public, with their names."""
    found: list[tuple[str, Function]] = []
    for node in tree.body:
        if isinstance(node, Function) and public(node.name):
            found.append((node.name, node))
        if isinstance(node, ast.ClassDef) and public(node.name):
            methods = [m for m in node.body if isinstance(m, Function) and public(m.name)]
            found += [(f"{node.name}.{m.name}", m) for m in methods if not any("overload" in d for d in decorators(m))]
    return found


def arguments(function: Function) -> list[str]:
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [a.arg for a in every if a.arg not in ("self", "cls") and public(a.arg)]


def returns_something(function: Function) -> bool:
    return function.returns is not None and ast.unparse(function.returns) not in ("None", "NoReturn")


def faults_of(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    where, faults = path.relative_to(ROOT), []
    if path.name != "__init__.py" and not ast.get_docstring(tree):
        faults.append(f"{where}: the module has no docstring")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and public(node.name):
            if not ast.get_docstring(node):
                faults.append(f"{where}:{node.lineno}: {node.name} has no docstring")
            faults += [f"{where}:{line}: {node.name}.{name} has no text" for line, name in fields_without_text(node)]
    for name, function in public_functions(tree):
        text, here = ast.get_docstring(function) or "", f"{where}:{function.lineno}: {name}"
        if not text:
            faults.append(f"{here} has no docstring")
            continue
        if any(d.split(".")[-1] in ("property", "cached_property", "setter", "override") for d in decorators(function)):
            continue
        named = set(re.findall(r"^\s{4}\*{0,2}(\w+)(?: \([^)]*\))?:", text.partition("Args:")[2], re.MULTILINE))
        missing = [a for a in arguments(function) if a not in named]
        if missing and function.name not in NO_ARGS_BLOCK:
            faults.append(f"{here}: no Args entry for {', '.join(missing)}")
        gives = "Returns:" in text or "Yields:" in text
        if returns_something(function) and arguments(function) and not gives:
            faults.append(f"{here}: no Returns")
        if not text.splitlines()[0].rstrip().endswith((".", ":", "?")):
            faults.append(f"{here}: the summary is not one line that ends with a full stop")
    return faults


def fields_without_text(node: ast.ClassDef) -> list[tuple[int, str]]:
    """Public fields of a dataclass that no string follows."""
    if not is_dataclass(node):
        return []
    missing = []
    for i, line in enumerate(node.body):
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name) or not public(line.target.id):
            continue
        after = node.body[i + 1] if i + 1 < len(node.body) else None
        if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)):
            missing.append((line.lineno, line.target.id))
    return missing


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_and_fields_are_documented(path):
    assert faults_of(path) == []


HABITS = {
    r"\bso (?:many|much)\b": "name the number or the limit",
    r"\bleast overlap": "minimum overlap",
    r"\bseen from above\b": "in BEV",
    r"\bis no result\b": "is not a reportable result",
    r"\btold the sizes\b": "given the sizes",
    r"\bbehind the rig\b": "after the rig's shift and scale",
    r"\bof none\b": "a sentence with a subject",
    r"\b(?:ms|kB|bytes|milliseconds|seconds) an? (?:frame|scene|step|scan)\b": "per frame, per scene, per step",
    r"\bas \w+ has (?:them|it)\b": "the same values as X",
    r"\b(?:design|upcycling|glc|moe|privacy)\.md section": "a file that a newcomer does not have",
    r"\.\./shared\b": "a folder that a newcomer does not have",
    r"\bissue \d": "an issue that a newcomer does not have",
}
TEXTS = [*FILES, *sorted((ROOT / "benchmarks").rglob("*.py")), ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_habits_that_are_hard_to_read(path):
    text = path.read_text()
    found = [
        f"{path.name}:{text[: m.start()].count(chr(10)) + 1}: {m.group(0)!r}: {better}"
        for pattern, better in HABITS.items()
        for m in re.finditer(pattern, text)
    ]
    assert found == []


def test_two_modules_never_export_one_name_for_two_things():
    """Type aliases of one shape, loggers, command functions and option classes may repeat."""
    shared = {"command", "ARGUMENTS", "T", "log"}
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, Function | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            for name in names:
                if public(name) and name not in shared:
                    places.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}

"""Which part may import which, read from the source: a vehicle that loads server code is a fault no other test would see."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import upcycle3d

ROOT = Path(upcycle3d.__file__).resolve().parent
PARTS = ("ops", "datasets", "perception", "tools", "benchmarks")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for part in PARTS for path in sorted((ROOT / part).rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """Modules of the package that ``name`` imports anywhere in its file, functions included, without the package's own name."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("upcycle3d.") for a in node.names if a.name.startswith("upcycle3d.")}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            elif (node.module or "").split(".")[0] == "upcycle3d":
                base = (node.module or "").split(".")[1:]
            else:
                continue
            base = [part for part in base if part]
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                found.add(whole if whole in MODULES else ".".join(base))
    return found - {""}


GRAPH = {name: imports_of(name) for name in MODULES}


def inside(name: str, *parts: str) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def offences(of: str, *, allowed: tuple[str, ...] | None = None, forbidden: tuple[str, ...] = ()) -> list[str]:
    members = [name for name in GRAPH if inside(name, of)]
    assert members, f"no module in {of}"
    return [
        f"{name} imports {target}"
        for name in members
        for target in sorted(GRAPH[name])
        if inside(target, *forbidden) or (allowed is not None and not inside(target, of, *allowed))
    ]


def test_the_graph_is_read():
    assert "ops.nms" in GRAPH["perception.models.post_processing"]
    assert "core.structures" in GRAPH["datasets.batches"]
    assert "core.boxes" in GRAPH["perception.models.targets"]


def test_operators_stand_alone():
    assert offences("ops", allowed=()) == []


VALUES = ("core.structures", "core.features", "core.boxes")
SERVER_SIDE = ("perception.server", "perception.training", "perception.evaluation", "perception.viz")


def test_datasets_know_no_model_and_no_training():
    assert offences("datasets", forbidden=("perception.models", "perception.vehicle", "tools", *SERVER_SIDE)) == []


def test_models_know_no_dataset_no_file_and_no_training():
    assert offences("perception.models", allowed=("ops", *VALUES)) == []


def test_encoders_know_no_decoder():
    assert offences("perception.models.encoders", allowed=("ops", *VALUES)) == []


def test_the_vehicle_needs_nothing_but_encoders_and_values():
    files = ("core.files", "core.config_json")
    assert offences("perception.vehicle", allowed=("ops", "perception.models.encoders", *VALUES, *files)) == []


def test_values_and_boxes_import_nothing_but_each_other():
    assert offences("core.structures", allowed=()) == []
    assert offences("core.features", allowed=("core.structures",)) == []
    assert offences("core.boxes", allowed=()) == []


def test_evaluation_does_not_train_and_nothing_but_tools_imports_tools():
    assert offences("perception.evaluation", forbidden=("perception.training", "perception.server")) == []
    assert offences("perception", forbidden=("tools", "benchmarks")) == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_habits_that_are_not_ours(name):
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        where = f"{MODULES[name]}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & {"pickle", "dill", "cloudpickle"}, where
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] not in ("pickle", "dill", "cloudpickle"), where
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except at {where}"
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                assert node.func.attr != "cuda", f".cuda() at {where}; the device comes from the tensors"
                called = ast.unparse(node.func)
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                assert called != "torch.save", f"{where} pickles"
                assert called != "torch.load" or safe, f"{where} reads pickles"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                assert not (keyword.arg == "parallel" and value), f"numba parallel=True at {where} kills forked workers"
                assert not (keyword.arg == "allow_pickle" and value), f"{where} reads pickles"


def loaded_by(statement: str) -> list[str]:
    """Modules of the package in memory after ``statement`` in a fresh interpreter."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps([m for m in sys.modules if m.startswith('upcycle3d.')]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_vehicles_command_loads_no_server_code():
    loaded = loaded_by("import upcycle3d.tools.main, upcycle3d.tools.extract")
    assert "upcycle3d.perception.vehicle.extractor" in loaded
    foreign = re.compile(r"\.(decoders|server|training|evaluation|viz|gt_database|augment|prepared|simulation)(\.|_|$)")
    assert [name for name in loaded if foreign.search(name)] == []
    assert [n for n in loaded if n.startswith("upcycle3d.datasets.")] == ["upcycle3d.datasets.point_files"]

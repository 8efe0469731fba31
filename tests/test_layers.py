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
PARTS = ("core", "ops", "datasets", "perception", "tools", "benchmarks")


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


# The tower: what each room may import besides itself. A room that is not in this table fails, and so does every other import.
GROUND = ("core", "ops")
ALLOWED: dict[str, tuple[str, ...]] = {
    "core": (),
    "ops": ("core", "ops.cpu"),
    "ops.cpu": ("core",),
    "datasets": GROUND,
    "datasets.readers": (*GROUND, "datasets"),
    "datasets.simulation": (*GROUND, "datasets"),
    "perception.viz": ("core",),
    "perception.viewers": ("core",),
    "perception.adapt": (),
    "perception.adapt.glc": ("core", "perception.viz"),
    "perception.moe.runtime": ("core",),
    "perception.moe.layers": ("core",),
    "perception.moe.surgery": ("core", "perception.moe.layers"),
    "perception.moe.attention": ("core", "perception.moe.layers", "perception.moe.surgery"),
    "perception.moe.carving": ("core", "perception.moe.layers", "perception.moe.surgery"),
    "perception.moe.upcycling": (
        "core",
        "perception.adapt.glc",
        "perception.moe.layers",
        "perception.moe.surgery",
        "perception.moe.attention",
    ),
    "perception.moe.checkpoints": (
        "core",
        "perception.moe.layers",
        "perception.moe.surgery",
        "perception.moe.attention",
        "perception.moe.carving",
        "perception.moe.upcycling",
    ),
    "perception.moe.contrastive": (
        "core",
        "perception.moe.layers",
        "perception.moe.surgery",
        "perception.moe.upcycling",
        "perception.moe.checkpoints",
    ),
    "perception.moe.language": (
        "core",
        "perception.moe.layers",
        "perception.moe.surgery",
        "perception.moe.attention",
        "perception.moe.upcycling",
        "perception.moe.checkpoints",
    ),
    "perception.moe.serving": (
        "core",
        "perception.moe.layers",
        "perception.moe.surgery",
        "perception.moe.checkpoints",
        "perception.moe.carving",
        "perception.moe.runtime",
        "perception.moe.language",
    ),
    "perception.moe": ("core", "perception.moe.layers", "perception.moe.attention"),
    "perception.models.defences": GROUND,
    "perception.models": (*GROUND, "perception.models.defences", "perception.models.encoders", "perception.models.decoders"),
    "perception.models.encoders": (*GROUND, "perception.models.defences"),
    "perception.models.decoders": (
        *GROUND,
        "perception.models",
        "perception.models.encoders",
        "perception.moe.layers",
        "perception.moe.surgery",
    ),
    "perception.wire": ("core", "perception.models.encoders"),
    "perception.vehicle": (*GROUND, "perception.models.encoders", "perception.wire"),
    "perception.conformance": (*GROUND, "perception.models.encoders", "perception.wire", "perception.vehicle"),
    "perception.export": (*GROUND, "perception.models", "perception.models.encoders", "perception.models.decoders"),
    "perception.training": (
        *GROUND,
        "datasets",
        "perception.models",
        "perception.models.defences",
        "perception.wire",
        "perception.moe.layers",
    ),
    "perception.server": (*GROUND, "datasets", "perception.models", "perception.wire", "perception.training"),
    "perception.evaluation": (*GROUND, "datasets", "perception.models"),
    "perception.adapt.detection": (
        *GROUND,
        "datasets",
        "perception.models",
        "perception.models.decoders",
        "perception.server",
        "perception.training",
        "perception.evaluation",
        "perception.viz",
        "perception.adapt.glc",
    ),
    "perception.privacy": (
        *GROUND,
        "datasets",
        "perception.models",
        "perception.models.defences",
        "perception.models.encoders",
        "perception.models.decoders",
        "perception.wire",
        "perception.vehicle",
        "perception.training",
        "perception.server",
        "perception.evaluation",
        "perception.viz",
    ),
    "perception.privacy.attacks": (
        *GROUND,
        "datasets",
        "perception.models",
        "perception.models.defences",
        "perception.models.encoders",
        "perception.models.decoders",
        "perception.wire",
        "perception.training",
        "perception.server",
        "perception.evaluation",
        "perception.privacy",
    ),
    "perception.moe.detectors": (
        *GROUND,
        "datasets",
        "perception.models",
        "perception.models.decoders",
        "perception.models.encoders",
        "perception.training",
        "perception.server",
        "perception.adapt.glc",
        "perception.moe.layers",
        "perception.moe.surgery",
        "perception.moe.upcycling",
        "perception.moe.contrastive",
    ),
    "perception.moe.driving": (
        *GROUND,
        "perception.models",
        "perception.models.decoders",
        "perception.training",
        "perception.moe.layers",
        "perception.moe.carving",
        "perception.moe.runtime",
        "perception.moe.serving",
    ),
    "perception.interchange": (
        *GROUND,
        "datasets",
        "perception.models",
        "perception.models.encoders",
        "perception.models.decoders",
    ),
    "perception.recipes": (
        *GROUND,
        "perception.interchange",
        "datasets",
        "datasets.simulation",
        "perception.models",
        "perception.models.defences",
        "perception.models.encoders",
        "perception.models.decoders",
        "perception.wire",
        "perception.vehicle",
        "perception.training",
        "perception.server",
        "perception.evaluation",
        "perception.viz",
        "perception.viewers",
        "perception.adapt.glc",
        "perception.adapt.detection",
        "perception.privacy",
        "perception.privacy.attacks",
        "perception.moe.upcycling",
        "perception.moe.detectors",
        "perception.moe.carving",
        "perception.moe.driving",
    ),
}
ALLOWED["tools"] = tuple(ALLOWED)  # everything below, but no benchmark
ALLOWED["benchmarks"] = ALLOWED["benchmarks.speed"] = ALLOWED["benchmarks.studies"] = tuple(ALLOWED)


def room_of(module: str) -> str:
    """The innermost room of the table that holds ``module``, or its folder where there is none."""
    found = [room for room in ALLOWED if module == room or module.startswith(f"{room}.")]
    return max(found, key=len) if found else module.rpartition(".")[0]


def test_the_graph_is_read():
    assert "ops.nms" in GRAPH["perception.models.post_processing"]
    assert "core.frame" in GRAPH["datasets.batches"]
    assert "core.boxes" in GRAPH["perception.models.targets"]


def test_every_folder_with_code_is_a_room_of_the_table():
    folders = {module_name(path.parent / "__init__.py") for path in MODULES.values()}
    assert folders - {"perception"} <= set(ALLOWED)
    assert [name for name in MODULES if name.count(".") == 1 and name.startswith("perception.") and name not in ALLOWED] == []


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_it_may(room):
    offences = [
        f"{module} imports {target}"
        for module in GRAPH
        if room_of(module) == room
        for target in sorted(GRAPH[module])
        if room_of(target) not in (room, *ALLOWED[room])
    ]
    assert offences == []


def test_the_table_has_no_circle_but_the_parts_of_a_model():
    """Rooms stand in order: each may import only rooms before it (encoders and decoders are parts of `models`)."""
    order = list(ALLOWED)
    parts = ("perception.models.encoders", "perception.models.decoders", "ops.cpu")
    upward = [(room, other) for room in order for other in ALLOWED[room] if order.index(other) >= order.index(room)]
    assert [(room, other) for room, other in upward if other not in parts] == []


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
    foreign = re.compile(r"\.(decoders|server|training|evaluation|viz|viewers|recipes|adapt|datasets)(\.|_|$)")
    assert [name for name in loaded if foreign.search(name)] == []


def test_the_vehicles_set_needs_no_package_of_the_server():
    """A vehicle installs torch, numpy, numba, safetensors and zstandard; what only the server uses is blocked here.

    A scan is smashed here, not only imported: a kernel that multiplies matrices by `np.dot` would need the BLAS that scipy ships.
    """
    rooms = ("core", "ops", "perception.models.encoders", "perception.wire", "perception.vehicle")
    names = [f"upcycle3d.{name}" for name in sorted(MODULES) if room_of(name) in rooms and name != "ops.spconv_backend"]
    blocked = ("scipy", "pyarrow", "matplotlib", "tensorboard", "tyro", "rich", "pandas", "PIL")
    smash = """
import torch
from upcycle3d.core.cut import VoxelGrid
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import PointCloud
from upcycle3d.perception.models.encoders.pv_rcnn import PvRcnnEncoderConfig
from upcycle3d.perception.models.encoders.second import SecondEncoderConfig
from upcycle3d.perception.vehicle.extractor import Extractor
from upcycle3d.perception.wire.codec import encode_scene
grid = VoxelGrid(range=(0.0, -8.0, -2.0, 16.0, 8.0, 2.0), voxel_size=(0.25, 0.25, 0.1))
encoder = PvRcnnEncoderConfig(voxels=SecondEncoderConfig(grid=grid, channels=(4, 4, 4, 4, 8)), keypoints=40).build()
points = PointCloud(xyz=torch.rand(500, 3) * 2, features=torch.rand(500, 1))
encode_scene(Extractor(encoder, RigSpec(), "int8").smash(points)[0])
"""
    code = "\n".join(
        [
            "import sys",
            f"for name in {blocked!r}: sys.modules[name] = None",
            "import importlib",
            f"for name in {names!r}: importlib.import_module(name)",
            smash,
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""The core of the mixtures needs nothing but torch and `core`: it serves any dense model, and no foreign package is loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import upcycle3d

ROOM = Path(upcycle3d.__file__).resolve().parent / "perception" / "moe"
FOREIGN = {"transformers", "timm", "open_clip", "peft", "accelerate"}


@pytest.mark.parametrize("path", sorted(ROOM.rglob("*.py")), ids=lambda path: path.name)
def test_no_file_imports_a_foreign_library_of_models_when_it_is_imported(path):
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not {name.split(".")[0] for name in names} & FOREIGN


def test_the_runtime_loads_without_torch():
    """It serves any network, also one that runs outside of torch, and a simulation starts at once."""
    code = "import sys, upcycle3d.perception.moe.runtime.simulate as s; print('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""`import upcycle3d` is fast, names what a user calls first, and refuses wrong input with a sentence."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import upcycle3d
from tiny import scan_with_car, second_iou
from upcycle3d.core.errors import InvalidInput, UpcycleError

ROOT = Path(upcycle3d.__file__).resolve().parent


def modules_after(statement: str) -> set[str]:
    """Names of the modules in memory after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("name", upcycle3d.__all__)
def test_every_public_name_loads_and_is_documented(name):
    value = getattr(upcycle3d, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_names_of_editors_and_of_run_time_agree():
    """Type checkers see the imports under TYPE_CHECKING, Python sees the table: one must not have what the other lacks."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname or alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen | {"__version__"} == set(upcycle3d.__all__)
    assert set(dir(upcycle3d)) == set(upcycle3d.__all__)


def test_the_import_and_the_help_load_no_torch():
    """They answer in a fraction of a second because nothing heavy is imported; torch alone takes more than a second."""
    heavy = {"torch", "numpy", "numba", "pyarrow", "matplotlib", "rich", "tyro", "scipy"}
    assert modules_after("import upcycle3d") & heavy == set()
    assert (
        modules_after("import upcycle3d.tools.main as m, sys\nsys.argv = ['upcycle3d', '--version']\nm.main()") & heavy == set()
    )


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="public names: Boxes3D, "):
        _ = upcycle3d.load_detectors


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "py.typed").exists()


def test_points_are_taken_as_numpy_and_wrong_ones_are_refused():
    cloud = upcycle3d.PointCloud.from_array(np.random.default_rng(0).normal(size=(5, 4)).clip(0, 1))
    assert cloud.xyz.dtype == torch.float32
    assert cloud.feature_names == ("intensity",)
    with pytest.raises(InvalidInput, match="3 of 3 points hold NaN or inf"):
        upcycle3d.PointCloud.from_array(np.full((3, 4), np.nan))
    with pytest.raises(InvalidInput, match="columns"):
        upcycle3d.PointCloud.from_array(np.zeros((3, 7)))


def test_a_detector_takes_one_scan_or_several_and_refuses_what_is_no_scan():
    detector, scan = second_iou().eval(), scan_with_car()
    one, several = detector.detect(scan), detector.detect([scan, scan])
    assert torch.equal(one.boxes.data, several[0].boxes.data)
    with pytest.raises(InvalidInput, match=r"PointCloud\.from_array"):
        detector.detect(np.zeros((10, 4)))  # type: ignore[call-overload]
    with pytest.raises(InvalidInput, match="training mode"):
        detector.train().detect(scan)


@pytest.mark.parametrize("size", [-1.0, 0.0, float("nan"), float("inf")])
def test_boxes_that_cannot_be_are_refused_where_they_are_made(size):
    with pytest.raises(InvalidInput):
        upcycle3d.Boxes3D.from_array([[0.0, 0, 0, 4, 2, size, 0]])


@pytest.mark.parametrize("name", ["load_detector", "load_encoder", "PreparedDataset", "SmashedStore"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_that_leads_nowhere_is_refused_by_name(name, kind, tmp_path):
    with pytest.raises(UpcycleError, match="nowhere"):
        getattr(upcycle3d, name)(kind(tmp_path / "nowhere"))


def test_a_mistyped_preset_or_method_suggests_the_nearest(tmp_path):
    with pytest.raises(InvalidInput, match="did you mean 'small'"):
        upcycle3d.train("smal", tmp_path, tmp_path / "run")
    inputs = importlib.import_module("upcycle3d.perception.recipes.job_inputs")
    with pytest.raises(InvalidInput, match="did you mean 'upcycling'"):
        inputs.find_method("upcyclin")

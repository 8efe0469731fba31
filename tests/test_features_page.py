"""docs/features.md is what benchmarks/feature_table.py writes when every check passes, and every check that it names is there."""

import re
import sys
from pathlib import Path

import pytest

import upcycle3d

ROOT = Path(upcycle3d.__file__).resolve().parent


@pytest.fixture(scope="module")
def features():
    """The script, without running any check."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import feature_table
    finally:
        sys.path.pop(0)
    return feature_table


def test_the_page_is_that_of_the_rows(features):
    assert (ROOT / "docs" / "features.md").read_text() == features.page_text()


def test_a_row_whose_check_failed_is_written_as_a_feature_that_we_lack(features):
    text = features.page_text({"KITTI"})
    assert re.search(r"^\| KITTI \|.*\| ○ its check failed \|$", text, re.MULTILINE)
    assert not re.search(r"^\| Waymo \|.*failed", text, re.MULTILINE)


def test_every_feature_of_another_toolkit_is_ours_or_has_a_reason(features):
    for row in features.all_rows():
        theirs = any(cell.startswith("●") for cell in row.peers)
        assert row.mark == "●" or row.why or not theirs, row.feature
        assert (row.mark == "○") == (not row.tests and not row.commands and not row.source), f"{row.feature} needs a check"
        assert not row.why or row.why.endswith("."), row.feature


def test_every_test_and_check_that_a_row_names_exists(features):
    for row in features.all_rows():
        for node in row.tests:
            file, _, function = node.partition("::")
            text = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^def {function.partition('[')[0]}\(", text, re.MULTILINE), node
        assert row.source in ("", *features.SOURCE_CHECKS), row.feature


def test_looks_at_our_own_files_find_nothing(features):
    assert {name: fault for name, look in features.SOURCE_CHECKS.items() if (fault := look())} == {}


def test_a_test_that_is_skipped_or_missing_proves_nothing(features, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_skipped(): pytest.skip('no')\n"
        "@pytest.mark.parametrize('n', [0, 1])\ndef test_cases(n): assert n == 0\n"
    )
    monkeypatch.setattr(features, "ROOT", tmp_path)
    nodes = ["test_x.py::test_good", "test_x.py::test_skipped", "test_x.py::test_cases", "test_x.py::test_cases[0]"]
    found = features.run_tests(nodes)
    assert [found[node] is None for node in nodes] == [True, False, False, True]
    assert features.run_tests(["test_x.py::test_gone"]) == {"test_x.py::test_gone": "was not run"}

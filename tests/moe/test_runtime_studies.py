"""The parts of the runtime's studies that must not lie: differences, controls, and a server that is compared with the plain forward pass."""

import sys
from pathlib import Path

import pytest
import torch

import upcycle3d
from moe_served import LETTERS, LetterCoder, carved_lm
from upcycle3d.perception.moe.runtime.requests import Request, Work
from upcycle3d.perception.moe.runtime.scheduling import BatchLimits, expert_aware, first_in_first_out, next_batch
from upcycle3d.perception.moe.serving.completion_server import CompletionServer, ServingConfig
from upcycle3d.perception.moe.serving.expert_store import MappedExpertStore
from upcycle3d.perception.moe.serving.served_models import open_served

pytestmark = pytest.mark.usefixtures("one_thread")
STUDIES = Path(upcycle3d.__file__).parent / "benchmarks" / "studies"


@pytest.fixture
def study(monkeypatch):
    """Imports a study as a script does: its folder is the first on the path."""
    monkeypatch.syspath_prepend(str(STUDIES))
    before = set(sys.modules)
    yield lambda name: __import__(name)
    for name in set(sys.modules) - before:
        if name.startswith("moe_"):
            del sys.modules[name]


def test_differences_are_paired_by_seed_and_other_arms_do_not_count(study):
    cells = study("moe_runtime_cells")
    rows = [{"policy": p, "load": load, "seed": s, "s": v} for p, load, s, v in (
        ("fifo", 1, 1, 4.0), ("fifo", 1, 0, 2.0), ("new", 1, 0, 1.0), ("new", 1, 1, 2.0), ("new", 2, 0, 9.0),
    )]  # fmt: skip
    assert cells.mean(rows, {"policy": "fifo", "load": 1}, "s") == 3.0
    assert cells.change(rows, {"policy": "new", "load": 1}, {"policy": "fifo"}, "s") == "-50.0 ± 0.0 %"


def test_a_cell_is_computed_once(study, tmp_path):
    cells = study("moe_runtime_cells")
    assert cells.cell(tmp_path, "a", lambda: [{"seed": 0, "x": 1.5}]) == [{"seed": 0, "x": 1.5}]
    assert cells.cell(tmp_path, "a", lambda: pytest.fail("it is there")) == [{"seed": 0, "x": 1.5}]


def test_the_controls_take_the_first_to_arrive_and_the_shortest_answer(study):
    batching = study("moe_runtime_batching")
    works = [
        Work(
            request=Request(id=id, kind="sequence", tokens=1, new_tokens=new),
            stage="decode",
            experts=(e,),
            tokens=1,
            since=s,
            since_batch=0,
        )
        for id, new, e, s in (("cmpl-3", 9, 0, 0.0), ("cmpl-1", 5, 1, 1.0), ("cmpl-2", 2, 1, 2.0))
    ]
    first = next_batch(batching.arrival_order, works, BatchLimits(works=2), number=0)
    assert [w.request.id for w in first.works] == ["cmpl-1", "cmpl-2"]
    oracle = next_batch(batching.shortest_leads, works, BatchLimits(), number=0)
    assert [w.request.id for w in oracle.works] == ["cmpl-2", "cmpl-1"]  # expert 0 is not in memory


def test_hit_ratios_of_a_short_trace_are_near_those_of_the_other_program(study):
    cache = study("moe_runtime_cache")
    rows = list(cache.hits("uniform", 0))
    for capacity in (2, 5):
        for name, known in cache.KNOWN["uniform", capacity].items():
            (found,) = (100 * r["hit_ratio"] for r in rows if (r["capacity"], r["cache"]) == (capacity, name))
            assert abs(found - known) < 1.5, (capacity, name)


def test_the_plain_pass_writes_the_served_text_and_a_replay_serves_everything(study, tmp_path):
    """The overhead is only meaningful if both compute the same; and arms are compared on the same requests."""
    pytest.importorskip("transformers", reason="transformers is not installed; the study reads SmolLM2 with it")
    alone, real = study("moe_serve_alone"), study("moe_serve_real")
    carved_lm(tmp_path)
    served, store = open_served(tmp_path), MappedExpertStore(open_served(tmp_path).experts, whole=False)
    for piece in range(store.layout.pieces):
        store.load(piece)
    server = CompletionServer(served, LetterCoder(), ServingConfig(budget=10**6))
    prompt = [LETTERS.index(letter) for letter in "north 1"]
    assert alone.carved_alone(served, store)(prompt, 9) == alone.served_alone(server)(prompt, 9)
    server.close()
    draw = torch.Generator().manual_seed(0)
    trace = [
        alone.Sent(at=0.001 * i, prompt=tuple(torch.randint(0, 30, (5,), generator=draw).tolist()), new_tokens=6)
        for i in range(12)
    ]
    rows = []
    for policy in (first_in_first_out, expert_aware):
        rows.append(real.serve_trace(real.Arm(policy=policy, works=3), served, tmp_path, LetterCoder(), trace))
    assert {row["generated"] for row in rows} == {72}
    assert all(row["most_mb"] <= sum(served.experts.form.expert_bytes) / 2e6 for row in rows)
    assert len({arm.labels["policy"] for arm in real.ARMS}) == 7
    assert len({tuple(arm.labels.values()) for arm in real.ARMS}) == len(real.ARMS)

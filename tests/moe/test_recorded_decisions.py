"""Files of a gate's decisions: what was written is read, what is damaged is refused, and traces are cut out of nothing else."""

import json

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.runtime.recorded_decisions import (
    DecisionSource,
    RecordedDecisions,
    read_decisions,
    write_decisions,
)
from upcycle3d.perception.moe.runtime.traces import TraceConfig, draw_trace

TEXTS = RecordedDecisions(
    experts=3,
    sources=(DecisionSource(name="law 0", experts=(0, 0, 1, 1, 1, 0, 0, 1)), DecisionSource(name="code 0", experts=(2,) * 9)),
)
SIZES = {"experts": 3, "prompt": (2, 4), "new_tokens": (1, 5)}


def test_a_file_gives_back_what_was_written(tmp_path):
    write_decisions(tmp_path / "d.json", TEXTS)
    assert read_decisions(tmp_path / "d.json") == TEXTS
    assert TEXTS.repeated == (4 + 8) / (7 + 8)  # counted by hand


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "expected the format"),
        ({"decisions": {"experts": 3, "sources": []}}, "at least one source"),
        ({"decisions": {"experts": 3, "sources": [{"name": "a", "experts": [3]}]}}, r"must be in 0\.\.2, found 3"),
        ({"decisions": {"experts": 3, "sources": [{"name": "a", "experts": []}]}}, "'a' has no decision"),
        ({"decisions": {"experts": 3, "sources": [{"name": "a", "experts": [0.5]}]}}, "experts"),
        ({"decisions": [1]}, "not an object"),
    ],
)
def test_what_is_damaged_is_refused(change, message, tmp_path):
    path = tmp_path / "d.json"
    write_decisions(path, TEXTS)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InvalidInput, match=message):
        read_decisions(path)


def test_sequences_are_pieces_of_one_source():
    trace = draw_trace(TraceConfig(requests=60, seed=1, **SIZES), TEXTS)
    texts = ["".join(map(str, source.experts)) for source in TEXTS.sources]
    pieces = ["".join(map(str, a.request.payload.first + a.request.payload.later)) for a in trace]
    assert all(any(piece in text for text in texts) for piece in pieces)
    assert {len(piece) for piece in pieces} == set(range(2, 9))
    assert len(set(pieces)) > 15
    assert [a.request.tokens + a.request.new_tokens - 1 for a in trace] == [len(piece) for piece in pieces]


def test_frames_are_the_sources_in_turn_each_in_its_order():
    trace = draw_trace(TraceConfig(requests=19, frames=1.0, **SIZES), TEXTS)
    found = [a.request.payload.first[0] for a in trace]
    assert found[0::2] == [*TEXTS.sources[0].experts, 0, 0]  # from its beginning again
    assert found[1::2] == [2] * 9


def test_sources_that_do_not_fit_the_requests_are_refused():
    with pytest.raises(InvalidInput, match=r"choose among 3 experts, and TraceConfig\.experts is 7"):
        draw_trace(TraceConfig(), TEXTS)
    with pytest.raises(InvalidInput, match="'law 0' has 8 decisions, and the longest request needs 9"):
        draw_trace(TraceConfig(experts=3, prompt=(2, 5), new_tokens=(1, 5)), TEXTS)

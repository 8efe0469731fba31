"""A few damaged inputs for every reader; `make faults` does a hundred thousand. And the campaign itself finds what it looks for."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import pytest

from faults.fuzzing import Reader, fuzz
from faults.mutations import mutate
from faults.readers import READERS
from upcycle3d.core.errors import InvalidInput

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_damaged_input_is_refused_with_a_sentence_or_read_as_before(reader, tmp_path):
    tally = fuzz(reader, tmp_path, itertools.count(7_000_000), until=time.monotonic() + 20, most=6 if reader.writes else 12)
    assert tally.faults == []
    assert tally.inputs > 0


def _reader(read) -> Reader:
    return Reader(
        name="made up",
        make=lambda folder: (folder / "a.txt").write_text("1 2 3") and None,
        read=read,
        files=("*.txt",),
        protected=True,
    )


def _found(reader: Reader, tmp_path) -> str:
    return " ".join(fuzz(reader, tmp_path, itertools.count(), until=time.monotonic() + 20, most=20).faults)


def test_the_campaign_notices_tracebacks_silent_values_and_memory(tmp_path):
    def numbers(folder):
        return [float(word) for word in (folder / "a.txt").read_bytes().split()]

    def whatever(folder):
        return (folder / "a.txt").read_bytes()

    def greedy(folder):
        if whatever(folder) == b"1 2 3":
            return None
        taken = bytearray(600 * 2**20)
        taken[::4096] = b"x" * len(taken[::4096])
        raise InvalidInput("refused, but late")

    assert "TRACEBACK ValueError" in _found(_reader(numbers), tmp_path)
    assert "OTHER VALUE in silence" in _found(_reader(whatever), tmp_path)
    assert _found(replace(_reader(whatever), protected=False), tmp_path) == ""
    assert "MEMORY" in " ".join(fuzz(_reader(greedy), tmp_path, itertools.count(), until=time.monotonic() + 20, most=1).faults)


def test_a_seed_damages_a_file_in_one_way():
    data = b'{"a": [1, 2, {"b": "text"}], "c": 0.5}'
    damaged = {mutate(data, ".json", random.Random(seed)) for seed in range(200)}
    assert len(damaged) > 100
    assert mutate(data, ".json", random.Random(3)) == mutate(data, ".json", random.Random(3))

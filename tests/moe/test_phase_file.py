"""A phase of training that is stopped goes on as if nothing had happened, and never with what belongs to another phase."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.language import phase_file
from upcycle3d.perception.moe.language.phases import TextPhase, train_on
from upcycle3d.perception.moe.language.small_lm import SmallLmConfig
from upcycle3d.perception.moe.language.text_training import TokenDomains
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.perception.moe.upcycling.upcyclers import RandomRouters, sparse_copy

pytestmark = pytest.mark.usefixtures("one_thread")
PHASE = TextPhase(steps=20, lr=1e-2, batch=2, length=8)
DOMAINS = TokenDomains({"a": torch.arange(60) % 20, "b": torch.arange(60) * 7 % 20})
SHARES = {"a": 1.0, "b": 1.0}


class Stopped(Exception):
    """Stands for a kill."""


def mixture() -> nn.Module:
    """A small mixture with dropout, so that random numbers matter, too."""
    seed = SmallLmConfig(vocabulary=20, width=16, hidden=24, layers=2, heads=2, kv_heads=1).build(1)
    plan = plan_replacement(seed, experts=3, active=1)
    made = sparse_copy(seed, plan, RandomRouters(experts=3, rule=TopKRule(k=1, norm="none"))).model
    made.layers[0].input_layernorm = nn.Sequential(made.layers[0].input_layernorm, nn.Dropout(0.3))
    return made


@pytest.fixture
def always(monkeypatch):
    """Keep the phase after every step."""
    plain = phase_file.PhaseFile.__init__
    monkeypatch.setattr(phase_file.PhaseFile, "__init__", lambda self, path, depends: plain(self, path, depends, every=-1.0))
    monkeypatch.setattr(phase_file.time, "monotonic", lambda: 0.0)


def stop_at(line: str, said: list[str]):
    def say(text: str) -> None:
        said.append(text)
        if text.startswith(line):
            raise Stopped

    return say


def test_a_stopped_phase_goes_on_and_gives_the_same_bits(tmp_path, always):
    """The joint training is the longest part of a job; a kill in its last minute cost all of it."""
    whole, path = mixture(), tmp_path / "mix.unfinished.safetensors"
    other = copy.deepcopy(whole)
    wanted = train_on(whole, DOMAINS, SHARES, PHASE)
    said: list[str] = []
    with pytest.raises(Stopped):
        train_on(copy.deepcopy(other), DOMAINS, SHARES, PHASE, say=stop_at("step 12 of 20", said), kept_at=path)
    torch.rand(3)  # other random numbers were drawn in between
    found = train_on(other, DOMAINS, SHARES, PHASE, say=said.append, kept_at=path)
    assert any(text.startswith("goes on after step 11 of 20") for text in said)
    assert found.losses == wanted.losses
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True))


def test_progress_is_said_every_tenth(tmp_path):
    said: list[str] = []
    train_on(mixture(), DOMAINS, SHARES, PHASE, say=said.append)
    assert len(said) == 10
    assert said[0].startswith("step 2 of 20: loss ")
    assert said[-1].endswith(" CPU seconds")


@pytest.mark.parametrize("change", ["options", "weights", "texts", "order"])
def test_another_phase_does_not_go_on_with_the_file(tmp_path, always, change):
    path = tmp_path / "mix.unfinished.safetensors"
    with pytest.raises(Stopped):
        train_on(mixture(), DOMAINS, SHARES, PHASE, say=stop_at("step 4", []), kept_at=path)
    model, domains, shares, phase = mixture(), DOMAINS, SHARES, PHASE
    if change == "options":
        phase = replace(PHASE, lr=1e-3)
    elif change == "weights":
        with torch.no_grad():
            next(model.parameters()).add_(1e-6)
    elif change == "texts":
        domains = TokenDomains({**DOMAINS.tokens, "b": torch.arange(60) % 19})
    else:
        shares = {"b": 1.0, "a": 1.0}
    with pytest.raises(InvalidInput, match=r"stopped after 3 steps.*delete the file to begin again"):
        train_on(model, domains, shares, phase, kept_at=path)


def test_a_damaged_file_is_refused(tmp_path, always):
    path = tmp_path / "mix.unfinished.safetensors"
    with pytest.raises(Stopped):
        train_on(mixture(), DOMAINS, SHARES, PHASE, say=stop_at("step 4", []), kept_at=path)
    data = bytearray(Path(path).read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InvalidInput, match="delete it, and the phase begins again"):
        train_on(mixture(), DOMAINS, SHARES, PHASE, kept_at=path)


def test_a_short_phase_writes_nothing(tmp_path):
    train_on(mixture(), DOMAINS, SHARES, PHASE, kept_at=tmp_path / "mix.unfinished.safetensors")
    assert list(tmp_path.iterdir()) == []

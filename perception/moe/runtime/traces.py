"""Traces for simulations: accesses to single experts, and requests with the decisions that a gate would make for them.

A *sticky* trace repeats the last expert with a probability and else draws uniformly, as tokens of one text and frames of one drive do.
All draws come from a seed. `RecordedDecisions` are cut into requests instead, so that a real gate decides. Read next: `simulate.py`, which
runs the traces.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ....core.errors import InvalidInput, require, require_counts, require_numbers
from ....core.foreign_text import shown
from .engine import Ungated
from .recorded_decisions import RecordedDecisions
from .requests import Request

Locality = Literal["uniform", "sticky", "mixed"]
"""How the experts of one request follow each other: `uniform`, `sticky`, or `mixed`, where each request draws one of the two."""


def sticky_accesses(count: int, *, experts: int, repeat: float = 0.0, seed: int = 0) -> tuple[int, ...]:
    """Draw accesses to experts.

    Args:
        count: Number of accesses.
        experts: Number of experts.
        repeat: Probability of the last expert; else any expert is drawn, the last one included. 0 is a uniform trace.
        seed: Decides all draws.

    Returns:
        Experts in the order of their use.

    Raises:
        InvalidInput: A number is out of range.
    """
    require_counts("sticky_accesses", least=0, most=100_000_000, count=count)
    require_counts("sticky_accesses", experts=experts)
    require_numbers("sticky_accesses", least=0, most=1, repeat=repeat)
    return _accesses(random.Random(seed), count, experts, repeat)


def _accesses(draw: random.Random, count: int, experts: int, repeat: float) -> tuple[int, ...]:
    found: list[int] = []
    for _ in range(count):
        again = bool(found) and draw.random() < repeat
        found.append(found[-1] if again else draw.randrange(experts))
    return tuple(found)


@dataclass(frozen=True, kw_only=True, eq=False)
class TracedDecisions:
    """Payload of a traced request: what the gate will decide."""

    first: tuple[int, ...]
    """Experts of the tokens of the prompt, or of the frame."""
    later: tuple[int, ...] = ()
    """Expert of each new token that is fed back: one less than the new tokens."""


def traced_gate(asked: Sequence[Ungated]) -> tuple[tuple[int, ...], ...]:
    """Decide what the trace says: the gate of a simulation.

    Args:
        asked: Works whose experts are wanted.

    Returns:
        The experts of each.

    Raises:
        InvalidInput: A request does not come from a trace.
    """
    answers: list[tuple[int, ...]] = []
    for one in asked:
        decisions = one.request.payload
        if not isinstance(decisions, TracedDecisions):
            raise InvalidInput(f"request {one.request.id!r} has no traced decisions, found {type(decisions).__name__}")
        answers.append(decisions.first if not one.generated else (decisions.later[one.generated - 1],))
    return tuple(answers)


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrival:
    """A request of a trace, and when it comes and is perhaps cancelled."""

    at: float
    """Seconds after the start."""
    request: Request
    """The request."""
    cancelled_at: float | None = None
    """Seconds after the start at which its sender cancels it."""


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """How requests are drawn."""

    requests: int = 200
    """Number of requests."""
    rate: float = 20.0
    """Mean number of arrivals per second; they form a Poisson process. `inf`: all come at the start."""
    experts: int = 7
    """Number of experts."""
    locality: Locality = "mixed"
    """How the experts of one request follow each other."""
    repeat: float = 0.95
    """Probability with which a sticky request repeats its last expert."""
    prompt: tuple[int, int] = (8, 64)
    """Fewest and most tokens of a prompt."""
    new_tokens: tuple[int, int] = (4, 32)
    """Fewest and most new tokens of a sequence."""
    frames: float = 0.0
    """Share of requests that are single frames; each needs one expert."""
    seed: int = 0
    """Decides all draws."""

    def __post_init__(self) -> None:
        require_counts("TraceConfig", most=10_000_000, requests=self.requests)
        require_counts("TraceConfig", experts=self.experts)
        require_counts("TraceConfig", most=10_000_000, prompt=self.prompt, new_tokens=self.new_tokens)
        require_numbers("TraceConfig", least=0, most=1, repeat=self.repeat, frames=self.frames)
        require(self.rate > 0, f"TraceConfig.rate must be above 0, found {self.rate}")
        require(
            self.locality in get_args(Locality), f"TraceConfig.locality must be uniform, sticky or mixed, found {self.locality!r}"
        )
        for name, pair in (("prompt", self.prompt), ("new_tokens", self.new_tokens)):
            require(len(pair) == 2 and pair[0] <= pair[1], f"TraceConfig.{name} must be fewest and most, found {pair}")


def draw_trace(config: TraceConfig, recorded: RecordedDecisions | None = None) -> tuple[Arrival, ...]:
    """Draw requests.

    Args:
        config: How they are drawn.
        recorded: Decisions to cut the requests out of: a sequence is any piece of any source, and frames take the sources in turn, each in
            its order and again from its beginning. None draws experts by `locality` and `repeat`, which do not count otherwise.

    Returns:
        Requests in the order of their arrival, with the ids `0`, `1` and further.

    Raises:
        InvalidInput: The recorded decisions have another number of experts, or a source is shorter than the longest sequence.

    Example:
        report = simulate(draw_trace(TraceConfig(requests=50)), setup)
    """
    if recorded is not None:
        _check_recorded(config, recorded)
    draw = random.Random(config.seed)
    at, frames, arrivals = 0.0, 0, []
    for i in range(config.requests):
        at += draw.expovariate(config.rate) if config.rate < float("inf") else 0.0
        if draw.random() < config.frames:
            expert = draw.randrange(config.experts) if recorded is None else _frame(recorded, frames)
            request = Request(id=str(i), kind="frame", tokens=1, payload=TracedDecisions(first=(expert,)))
            frames += 1
        else:
            sticky = config.locality == "sticky" or (config.locality == "mixed" and draw.random() < 0.5)
            prompt, new = draw.randint(*config.prompt), draw.randint(*config.new_tokens)
            count = prompt + new - 1
            if recorded is None:
                chosen = _accesses(draw, count, config.experts, config.repeat if sticky else 0.0)
            else:
                chosen = _piece(recorded, draw, count)
            experts = TracedDecisions(first=chosen[:prompt], later=chosen[prompt:])
            request = Request(id=str(i), kind="sequence", tokens=prompt, new_tokens=new, payload=experts)
        arrivals.append(Arrival(at=at, request=request))
    return tuple(arrivals)


def _check_recorded(config: TraceConfig, recorded: RecordedDecisions) -> None:
    require(
        recorded.experts == config.experts,
        f"the recorded decisions choose among {recorded.experts} experts, and TraceConfig.experts is {config.experts}",
    )
    shortest = min(recorded.sources, key=lambda source: len(source.experts))
    longest = config.prompt[1] + config.new_tokens[1] - 1
    require(
        config.frames == 1 or len(shortest.experts) >= longest,
        f"the source {shown(shortest.name)!r} has {len(shortest.experts)} decisions, and the longest request needs {longest}; shorten "
        "TraceConfig.prompt and new_tokens, or leave the source out",
    )


def _piece(recorded: RecordedDecisions, draw: random.Random, count: int) -> tuple[int, ...]:
    """Neighboring decisions at any place of any source."""
    experts = draw.choice(recorded.sources).experts
    begin = draw.randint(0, len(experts) - count)
    return experts[begin : begin + count]


def _frame(recorded: RecordedDecisions, number: int) -> int:
    """The sources in turn, each in its order and again from its beginning."""
    turn, place = divmod(number, len(recorded.sources))
    experts = recorded.sources[place].experts
    return experts[turn % len(experts)]

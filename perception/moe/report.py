"""What a mixture does: use of the experts by domain, cost, what trains, and its quality beside the dense model's.

Look at it before training. A mixture that starts far worse than its dense model was built with a rule that does not fit, and much training
goes into repairing it. Read next: `usage.py`, which counts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ...core.errors import InvalidInput, require
from .attention.attention_calls import mixed_attentions
from .attention.model_cost import idle_parameters
from .layers.moe_ffn import MoeFfn, moe_layers
from .layers.routers import equal_rows

_MORE_IS_BETTER = {"perplexity": False, "recall": True}

_FAR = 2.0


@dataclass(frozen=True, kw_only=True)
class DomainScore:
    """One domain."""

    domain: str
    """Its name."""
    score: float
    """Score of the model."""
    cpu_seconds: float
    """CPU time of the model."""
    dense: float | None = None
    """Score of the dense model, where there is one."""
    dense_cpu_seconds: float | None = None
    """CPU time of the dense model."""


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """Use of one layer's experts."""

    name: str
    """Name of the layer."""
    kind: Literal["ffn", "attention"]
    """What it mixes. Attentions count the mean weight of each expert."""
    shares: tuple[tuple[float, ...], ...]
    """Share of each expert, for each domain in order."""
    information: float
    """How much the domain says about the expert, 0 to 1: mutual information of the two divided by its largest value."""
    dead: tuple[int, ...] = ()
    """Experts that no token of any domain chose."""


@dataclass(frozen=True, kw_only=True)
class MoeReport:
    """The report. `print(report)` shows it."""

    quality: str
    """Name of the measure that the scores are."""
    scores: tuple[DomainScore, ...]
    """Score of each domain."""
    layers: tuple[LayerUse, ...]
    """Use of each layer's experts; none for a dense model."""
    parameters: int
    """Parameters of the model."""
    active: int
    """Parameters that one token uses."""
    dense_parameters: int | None
    """Parameters of the dense model."""
    trained: tuple[str, ...]
    """Names of the parameters that need a gradient."""
    trained_values: int
    """Number of values in them."""
    trained_banks: int
    """Number of expert banks all of whose tensors train."""
    warnings: tuple[str, ...]
    """What should be looked at."""
    experts: tuple[str, ...] = ()
    """Names of the experts, in order; none where they have only numbers."""

    def __str__(self) -> str:
        dense = "" if self.dense_parameters is None else f", the dense model has {self.dense_parameters:,}"
        lines = [f"{self.parameters:,} parameters, {self.active:,} of them active per token{dense}"]
        lines.append(
            f"trains: {len(self.trained)} tensors with {self.trained_values:,} values; {self.trained_banks} expert banks train completely"
        )
        if self.experts:
            lines.append(f"experts: {', '.join(f'{number} {name}' for number, name in enumerate(self.experts))}")
        for s in self.scores:
            beside = "" if s.dense is None else f"; dense {s.dense:.4g} in {s.dense_cpu_seconds:.1f} CPU-s"
            lines.append(f"{s.domain}: {self.quality} {s.score:.4g} in {s.cpu_seconds:.1f} CPU-s{beside}")
        for layer in self.layers:
            by_domain = "; ".join(
                f"{s.domain} {' '.join(f'{x:.2f}' for x in shares)}" for s, shares in zip(self.scores, layer.shares)
            )
            lines.append(f"{layer.name} ({layer.kind}), domain tells {100 * layer.information:.0f} % of the expert: {by_domain}")
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def report_on(
    model: nn.Module,
    scores: Mapping[str, Callable[[nn.Module], float]],
    *,
    dense: nn.Module | None = None,
    quality: str = "perplexity",
    more_is_better: bool | None = None,
    experts: Sequence[str] = (),
) -> MoeReport:
    """Run a model on several domains and report on it. The counters of its layers start anew.

    Args:
        model: The mixture, in evaluation mode. A dense model gets scores and cost, and no use of experts.
        scores: For each domain, what runs a model on it and returns its score.
        dense: The dense model it was made of, in evaluation mode.
        quality: Name of the measure that the functions return, such as "perplexity" or "recall".
        more_is_better: Whether a larger score is a better one. It is known for perplexity and recall; other measures need it.
        experts: Names of the experts, in order.

    Returns:
        The report.

    Raises:
        InvalidInput: There is no domain, `scores` is no mapping of functions, or nothing says whether more is better.

    Example:
        report = report_on(mixture, {"code": lambda m: perplexity(m, code), "law": lambda m: perplexity(m, law)}, dense=llama)
        print(report)
    """
    _check_scores(scores)
    better = _MORE_IS_BETTER.get(quality) if more_is_better is None else more_is_better
    if better is None:
        raise InvalidInput(
            f"nothing says whether more of {quality!r} is better; pass more_is_better=True or more_is_better=False"
        )
    attentions = mixed_attentions(model)
    ffns = tuple((name, layer) for name, layer in moe_layers(model) if layer.bank.shape.experts > 1)
    uses: dict[str, list[tuple[float, ...]]] = {name: [] for name, _ in (*ffns, *attentions)}
    counts: dict[str, list[float]] = {name: [0.0] * layer.bank.shape.experts for name, layer in ffns}
    found = []
    for domain, run in scores.items():
        for _, layer in ffns:
            layer.usage.reset()
        for _, attention in attentions:
            attention.take_use()
        score, seconds = _timed(run, model)
        for name, layer in ffns:
            value = layer.usage.value
            uses[name].append(value.shares)
            counts[name] = [a + b for a, b in zip(counts[name], value.use)]
        for name, attention in attentions:
            uses[name].append(attention.take_use())
        other = (None, None) if dense is None else _timed(run, dense)
        found.append(DomainScore(domain=domain, score=score, cpu_seconds=seconds, dense=other[0], dense_cpu_seconds=other[1]))
    layers = [
        LayerUse(
            name=name,
            kind="ffn",
            shares=tuple(uses[name]),
            information=_information(uses[name]),
            dead=tuple(i for i, use in enumerate(counts[name]) if use == 0),
        )
        for name, _ in ffns
    ]
    layers += [
        LayerUse(name=name, kind="attention", shares=tuple(uses[name]), information=_information(uses[name]))
        for name, _ in attentions
    ]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return MoeReport(
        quality=quality,
        scores=tuple(found),
        layers=tuple(layers),
        parameters=sum(p.numel() for p in model.parameters()),
        active=sum(p.numel() for p in model.parameters()) - sum(idle_parameters(layer) for _, layer in ffns),
        dense_parameters=None if dense is None else sum(p.numel() for p in dense.parameters()),
        trained=tuple(parameters),
        trained_values=sum(p.numel() for p in parameters.values()),
        trained_banks=sum(all(p.requires_grad for p in layer.bank.parameters()) for _, layer in ffns),
        warnings=tuple([*_far_scores(found, quality, better), *_warnings(layers, ffns, experts)]),
        experts=tuple(experts),
    )


def _check_scores(scores: object) -> None:
    if not isinstance(scores, Mapping) or not all(callable(run) for run in scores.values()):
        wrong = next((run for run in scores.values() if not callable(run)), None) if isinstance(scores, Mapping) else scores
        raise InvalidInput(
            "a report needs a mapping of names of domains to functions that take a model and return its score, such as "
            f'{{"pairs": recall_of}}, found {"a function" if callable(wrong) else f"a {type(wrong).__name__}"}'
        )
    require(bool(scores), "a report needs at least one domain to run the model on")


def _timed(run: Callable[[nn.Module], float], model: nn.Module) -> tuple[float, float]:
    start = time.process_time()
    return run(model), time.process_time() - start


def _information(shares: Sequence[Sequence[float]]) -> float:
    """Mutual information of domain and expert over equally frequent domains, divided by the smaller of its two upper bounds."""
    if len(shares) < 2 or len(shares[0]) < 2:
        return 0.0
    mean = [statistics.fmean(column) for column in zip(*shares)]
    total = sum(p * math.log(p / q) for row in shares for p, q in zip(row, mean) if p > 0) / len(shares)
    return max(0.0, total / math.log(min(len(shares), len(mean))))


def _far_scores(scores: Sequence[DomainScore], quality: str, more_is_better: bool) -> list[str]:
    """Warnings of scores that are far worse than the dense model's."""
    texts = []
    for s in scores:
        if s.dense is None or not s.dense:
            continue
        worse = s.dense / max(s.score, 1e-12) if more_is_better else s.score / s.dense
        if worse > _FAR or not math.isfinite(s.score):
            texts.append(
                f"{quality} of {s.domain} is {s.score:.4g}, and {s.dense:.4g} for the dense model. Before training that is a sign of a rule "
                "that does not fit: a top-1 weight without renormalization or scale, experts of strangers, or a swapped gate"
            )
    return texts


def _warnings(layers: Sequence[LayerUse], ffns: Sequence[tuple[str, MoeFfn]], experts: Sequence[str]) -> list[str]:
    """Warnings of experts without tokens and of equal routers."""
    texts = []
    for layer in layers:
        if layer.dead:
            names = f" ({', '.join(experts[i] for i in layer.dead)})" if len(experts) > max(layer.dead) else ""
            texts.append(f"experts {list(layer.dead)}{names} of {layer.name} served no token of these domains")
    for name, mixture in ffns:
        weight = getattr(mixture.router, "weight", None)
        if weight is not None and weight.shape[0] > 1 and (pairs := equal_rows(weight)):
            texts.append(
                f"the router rows of experts {pairs[0][0]} and {pairs[0][1]} of {name} are equal, so no token can tell them apart"
            )
    return texts

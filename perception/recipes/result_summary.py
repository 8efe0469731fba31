"""What the results of one method over its seeds amount to: means, spreads, closed gaps.

Read next: `upcycling_report.py`, which prints them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .method_run import MethodResult

ORACLES = ("oracle_frozen", "oracle_full")

Results = Mapping[str, Mapping[int, MethodResult]]
"""Results by method and seed."""


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One method over its seeds: a row of the table. Scores are in percent, by metric."""

    seeds: int
    """Number of seeds with a result."""
    mean: Mapping[str, float]
    """Mean score of the student after the last step."""
    spread: Mapping[str, float]
    """Standard deviation of that score; 0 with one seed."""
    best: Mapping[str, float]
    """Mean of the best score along the way. Selected with target labels, so not a reportable result."""
    along: Mapping[int, Mapping[str, float]]
    """Mean score by number of steps done."""
    closed: Mapping[str, Mapping[str, float | None]]
    """Closed gap in percent by oracle and metric. None where there is no gap, or no result of the oracle."""
    minutes: float
    """Mean duration of training and scoring."""


def summarize(results: Results) -> dict[str, ResultRow]:
    """Summarize every method that has a result.

    Args:
        results: Results by method and seed.

    Returns:
        A row for each method, in the same order. Closed gaps are computed from the means over the seeds that the method, `source_only`
        and the oracle share.
    """
    metrics = list(dict.fromkeys(m for by_seed in results.values() for r in by_seed.values() for m in r.student))
    return {name: _row(results, name, metrics) for name in results}


def _row(results: Results, name: str, metrics: Sequence[str]) -> ResultRow:
    by_seed = results[name]
    values = {m: _scores(results, name, m, list(by_seed)) for m in metrics}
    steps = set.intersection(*({step for step, _ in r.history} for r in by_seed.values()))
    along = [dict(r.history) for r in by_seed.values()]
    return ResultRow(
        seeds=len(by_seed),
        mean={m: statistics.fmean(v) for m, v in values.items()},
        spread={m: standard_deviation(v) for m, v in values.items()},
        best={m: statistics.fmean(r.best().get(m, 0.0) for r in by_seed.values()) for m in metrics},
        along={s: {m: statistics.fmean(h[s].get(m, 0.0) for h in along) for m in metrics} for s in sorted(steps)},
        closed={oracle: {m: _closed_gap_over_seeds(results, name, oracle, m) for m in metrics} for oracle in ORACLES},
        minutes=statistics.fmean(r.seconds for r in by_seed.values()) / 60,
    )


def _scores(results: Results, name: str, metric: str, seeds: Sequence[int]) -> list[float]:
    return [results[name][seed].student.get(metric, 0.0) for seed in seeds]


def _closed_gap_over_seeds(results: Results, name: str, oracle: str, metric: str) -> float | None:
    seeds = sorted(set.intersection(*(set(results.get(n, {})) for n in ("source_only", name, oracle))))
    if not seeds:
        return None
    source, own, best = (_scores(results, n, metric, seeds) for n in ("source_only", name, oracle))
    return closed_gap(
        *map(statistics.fmean, (source, own, best)), noise=max(standard_deviation(source), standard_deviation(best))
    )


def closed_gap(source: float, method: float, oracle: float, *, noise: float = 0.0) -> float | None:
    """The share of the distance from the source model to an oracle that a method covers.

    Args:
        source: Score of the source model, in percent.
        method: Score of the method.
        oracle: Score of the oracle.
        noise: Spread of the scores over seeds.

    Returns:
        (method - source) / (oracle - source) in percent. None where the gap is under 2 points or under the noise, so that it says nothing.
    """
    gap = oracle - source
    return None if gap < max(2.0, noise) else 100.0 * (method - source) / gap


def standard_deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds.

    Args:
        values: One value per seed.

    Returns:
        The sample standard deviation; 0 for one value.
    """
    return statistics.stdev(values) if len(values) > 1 else 0.0


def differences(results: Results, name: str, others: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """What one method's student scores above others, seed by seed.

    Args:
        results: Results by method and seed.
        name: The method.
        others: Methods to subtract.

    Returns:
        Differences in percentage points, by other method and metric, one for each seed that both have, seeds ascending.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for other in others:
        seeds = sorted(set(results[name]) & set(results[other]))
        metrics = list(next(iter(results[name].values())).student)
        pairs = {m: zip(_scores(results, name, m, seeds), _scores(results, other, m, seeds), strict=True) for m in metrics}
        found[other] = {m: [own - theirs for own, theirs in both] for m, both in pairs.items()}
    return found

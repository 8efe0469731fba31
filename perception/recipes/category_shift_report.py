"""Tables of the category-shift experiment, from its results or from the CSV file that it publishes.

Read next: `perception/adapt/detection/proposal_metrics.py` for what is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...core.config_json import Json
from ..adapt.detection.measure import ADAPTED
from .category_shift import SHIFTS
from .result_cache import ResultCache
from .result_csv import CsvRow, read_rows
from .upcycling_report import TextTable

DETECTOR = "detector"
"""Name of the detector's own classes among what classifies proposals. It has AP of the known classes only."""

Measurements = Mapping[tuple[str, int], Mapping[str, Mapping[str, float]]]
"""By (scenario, seed) and by what classified the proposals: values by name, as `matched/h` or `private/Truck/objects`."""

_NOT_MEASURED = ("scenario", "seed", "classified_by", "time", "environment")
_OPEN_SET = {
    "OS*": "os_star",
    "UNK": "unk",
    "H": "h",
    "AUROC": "auroc",
    "FPR95": "fpr95",
    "closed accuracy": "closed_accuracy",
    "accuracy": "accuracy",
}


def measurements(result: Json) -> dict[str, dict[str, float]]:
    """The numbers of one result, flat.

    Args:
        result: What `adaptation_result` collected.

    Returns:
        Values by name, by what classified the proposals. Values by distance and the losses of the epochs are left out; nothing that is
        None has an entry.
    """
    found = {DETECTOR: {f"known_ap/{name}": value for name, value in result["detector_ap"].items()}}
    for name, report in result["metrics"].items():
        found[name] = dict(_flat({key: value for key, value in report.items() if key != "ranges"}))
    found[ADAPTED]["class_number"] = result["class_number"]
    return found


def _flat(values: Mapping[str, Json], prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif value is not None:
            yield f"{prefix}{name}", value


def category_shift_rows(scenario: str, seed: int, result: Json) -> list[CsvRow]:
    """A result as rows of `results.csv`.

    Args:
        scenario: The scenario.
        seed: The seed.
        result: What `adaptation_result` collected.

    Returns:
        One row for each way in which proposals were classified.
    """
    found = measurements(result)
    return [{"scenario": scenario, "seed": seed, "classified_by": name, **values} for name, values in found.items()]


def read_category_shift_csv(path: Path) -> Measurements:
    """Read measurements back from `results.csv`.

    Args:
        path: The file or its folder.

    Returns:
        Measurements, by scenario in the order of `SHIFTS` and by seed.
    """
    found: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for row in read_rows(path):
        values = {name: float(text) for name, text in row.items() if name not in _NOT_MEASURED}
        found.setdefault((row["scenario"], int(row["seed"])), {})[row["classified_by"]] = values
    return _ordered(found)


def category_shift_results(cache: ResultCache) -> Measurements:
    """Read every finished result.

    Args:
        cache: Results of a comparison.

    Returns:
        Measurements, by scenario in the order of `SHIFTS` and by seed.
    """
    return _ordered({key: measurements(stored["result"]) for key, stored in cache.stored().items()})


def _ordered(found: Measurements) -> Measurements:
    return dict(sorted(found.items(), key=lambda item: (SHIFTS.index(item[0][0]), item[0][1])))  # type: ignore[arg-type]


# ---- tables


def category_shift_tables(found: Measurements) -> list[TextTable]:
    """Means and spreads over seeds, and the values of each seed.

    Args:
        found: Measurements.

    Returns:
        Tables: proposals on objects, AP of the known classes, values by seed, and private classes.
    """
    seeds = {scenario: [seed for name, seed in found if name == scenario] for scenario in dict.fromkeys(k for k, _ in found)}
    scenarios = {scenario: [found[scenario, seed] for seed in theirs] for scenario, theirs in seeds.items()}
    return [
        _open_set_table(scenarios, len({seed for _, seed in found})),
        _known_ap_table(scenarios),
        _seed_table(scenarios, seeds),
        _private_table(scenarios),
    ]


_BySeed = Sequence[Mapping[str, Mapping[str, float]]]


def _classifiers(by_seed: _BySeed) -> list[str]:
    return [name for name in by_seed[0] if name != DETECTOR]


def _open_set_table(scenarios: Mapping[str, _BySeed], seeds: int) -> TextTable:
    rows = []
    for scenario, by_seed in scenarios.items():
        for name in _classifiers(by_seed):
            reports = [seed[name] for seed in by_seed]
            matched = [_mean([r.get(f"matched/{column}") for r in reports], 3) for column in _OPEN_SET.values()]
            change = _mean([mean_ap_change(seed, name) for seed in by_seed], 1)
            rows.append((scenario, name, *matched, change, *_shares(reports)))
    header = ("scenario", "classified by", *_OPEN_SET, "known AP", "proposed", "novel", "private among unknown")
    return TextTable(f"Proposals on objects, {seeds} seeds", header, rows)


def mean_ap_change(by_name: Mapping[str, Mapping[str, float]], name: str) -> float:
    """How much the AP of the known classes changes when proposals get other classes than the detector's.

    Args:
        by_name: Measurements of one scenario and seed.
        name: What classified the proposals.

    Returns:
        Mean change over all AP of the known classes, in percentage points.
    """
    return statistics.fmean(by_name[name][metric] - before for metric, before in by_name[DETECTOR].items())


def _shares(reports: Sequence[Mapping[str, float]]) -> tuple[str, str, str]:
    """Share of private objects with a proposal, novel-category accuracy, share of private objects among what is called unknown."""
    proposed: list[float | None] = []
    among: list[float | None] = []
    for report in reports:
        private = _private_classes(report)
        objects = sum(report[f"private/{name}/objects"] for name in private)
        called = [report[f"called_unknown/{kind}"] for kind in ("private", "known", "background")]
        proposed.append(sum(report[f"private/{name}/proposed"] for name in private) / objects if objects else None)
        among.append(called[0] / max(1, sum(called)) if objects else None)
    return _mean(proposed, 3), _mean([r.get("novel_category_accuracy") for r in reports], 3), _mean(among, 3)


def _private_classes(report: Mapping[str, float]) -> list[str]:
    return [name.split("/")[1] for name in report if name.startswith("private/") and name.endswith("/objects")]


def _known_ap_table(scenarios: Mapping[str, _BySeed]) -> TextTable:
    rows = []
    for scenario, by_seed in scenarios.items():
        for metric in by_seed[0][DETECTOR]:
            before, after = [seed[DETECTOR][metric] for seed in by_seed], [seed[ADAPTED][metric] for seed in by_seed]
            change = [a - b for a, b in zip(after, before, strict=True)]
            rows.append((scenario, metric.removeprefix("known_ap/"), _mean(before, 1), _mean(after, 1), _mean(change, 1)))
        rows.append((scenario, "mean of these", "", "", _mean([mean_ap_change(seed, ADAPTED) for seed in by_seed], 1)))
    return TextTable("AP R40 of the known classes, percent", ("scenario", "metric", "detector", "adapted", "change"), rows)


def _seed_table(scenarios: Mapping[str, _BySeed], seeds: Mapping[str, Sequence[int]]) -> TextTable:
    rows = []
    for scenario, by_seed in scenarios.items():
        column = "H" if "matched/h" in by_seed[0][ADAPTED] else "accuracy"
        theirs = " ".join(map(str, seeds[scenario]))
        for name in _classifiers(by_seed):
            values = [seed[name][f"matched/{_OPEN_SET[column]}"] for seed in by_seed]
            changes = [mean_ap_change(seed, name) for seed in by_seed]
            scores = f"{column}: {' '.join(f'{v:.3f}' for v in values)}"
            rows.append((scenario, name, theirs, scores, " ".join(f"{v:+.1f}" for v in changes)))
    header = ("scenario", "classified by", "seeds", "H, or accuracy with rejection", "change of known AP")
    return TextTable("Values by seed", header, rows)


def _private_table(scenarios: Mapping[str, _BySeed]) -> TextTable:
    rows = []
    for scenario, by_seed in scenarios.items():
        for name in _private_classes(by_seed[0][ADAPTED]):
            reports = [seed[ADAPTED] for seed in by_seed]
            shares = [
                r[f"private/{name}/proposed"] / r[f"private/{name}/objects"] for r in reports if r[f"private/{name}/objects"]
            ]
            unknown = [r[f"private/{name}/unknown"] for r in reports if f"private/{name}/unknown" in r]
            spans = [f"{min(v):.2f} to {max(v):.2f}" if v else "-" for v in (shares, unknown)]
            rows.append((scenario, name, *spans))
    header = ("scenario", "class", "share of objects proposed", "share of their proposals called unknown, adapted")
    return TextTable("Private classes, range over seeds", header, rows)


def _mean(values: Sequence[float | None], digits: int) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    deviation = f" ± {statistics.stdev(there):.{digits}f}" if len(there) > 1 else ""
    return f"{statistics.fmean(there):.{digits}f}{deviation}"

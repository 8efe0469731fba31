"""What labeling costs: CPU seconds on one thread at N = 20,000, D = 256, C = 10, and memory by the number of classes C.

    python benchmarks/studies/glc_labeling.py [--repeats 5] [--json FILE]

The first epoch estimates the class number and makes labels; later epochs make labels only. The time is process CPU time, the median of
the repeats after one to warm up, on the N = 20,000 draw of the Gaussian generator. Memory is the maximum that torch holds above its inputs
during labeling, by its own profiler, for random features (20,000, 256) and C classes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from glc_gaussian import SETS, gaussian_domains, train_linear
from torch.profiler import ProfilerActivity, profile

from upcycle3d.perception.adapt.glc.class_number import ClassNumberConfig, class_number_candidates, estimate_class_number
from upcycle3d.perception.adapt.glc.metrics import open_set_scores
from upcycle3d.perception.adapt.glc.one_vs_all import OneVsAllConfig, one_vs_all_labels
from upcycle3d.tools.console import print_table, write_json

OFFICIAL = {"first": 156.4, "later": 0.293}


def cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median process CPU time of `call` after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held at once during `call`, above where it began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = peak = 0
    for event in sorted(
        (e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):  # type: ignore[union-attr]
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = SETS["n20000"]
    domains = gaussian_domains(spec)
    features, probabilities, _ = train_linear(domains, spec.classes)
    rows, result = [], {}
    for name, guess, config in (
        ("paper's", ClassNumberConfig.paper(), OneVsAllConfig.paper()),
        ("earlier defaults", ClassNumberConfig(), OneVsAllConfig()),
    ):
        candidates = class_number_candidates(spec.classes, guess.candidates)
        number = estimate_class_number(features, candidates, guess).value
        search = cpu_seconds(lambda c=candidates, g=guess: estimate_class_number(features, c, g), arguments.repeats)  # type: ignore[misc]
        later = cpu_seconds(lambda k=number, c=config: one_vs_all_labels(features, probabilities, k, c), arguments.repeats)  # type: ignore[misc]
        scores = open_set_scores(one_vs_all_labels(features, probabilities, number, config).hard.numpy(), domains.y, range(6), 10)
        rows.append((name, f"{search + later:.3f}", f"{later:.3f}", number, f"{scores.h:.3f}"))
        result[name] = {"first": search + later, "later": later, "class_number": number, "h": scores.h}
    rows.append(("released code", f"{OFFICIAL['first']}", f"{OFFICIAL['later']}", 10, "0.699"))
    print_table(
        "labelling, CPU s, one thread", ("options", "first epoch", "later epochs", "class number", "H of the labels"), rows
    )

    memory = []
    for classes in (3, 10, 50, 200):
        p = torch.randn(20000, classes, generator=torch.Generator().manual_seed(0)).softmax(1)
        bytes_held = peak_bytes(lambda p=p: one_vs_all_labels(features, p, 10, OneVsAllConfig()))  # type: ignore[misc]
        memory.append((classes, f"{bytes_held / 1e6:.1f}", f"{p.nbytes / 1e6:.1f}"))
    print_table(
        "memory of labelling at N = 20,000, D = 256, K = 10",
        ("C", "peak MB above the inputs", "of the probabilities alone, MB"),
        memory,
    )
    write_json(arguments.json, {"time": result, "memory": memory})


if __name__ == "__main__":
    main()

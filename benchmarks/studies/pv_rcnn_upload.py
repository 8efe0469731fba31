"""What the repair of PV-RCNN's upload costs: AP after UpCycling with and without the features from which points can be solved.

    python benchmarks/studies/pv_rcnn_upload.py OUT --scenario waymo_lyft --seeds 0 1 2 3 4

Every variant trains its own source model, because its keypoints have other features. Data are the same for all variants of a seed. Results
are stored one by one, so the command can be stopped and given again. docs/results.md has the numbers.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from upcycle3d.perception.recipes import architectures
from upcycle3d.perception.recipes.experiment_data import ExperimentData, SimulationSize, simulated_adaptation
from upcycle3d.perception.recipes.job_folder import RunOptions
from upcycle3d.perception.recipes.presets import DEMO_PV_RCNN
from upcycle3d.perception.recipes.upcycling_experiment import SCENARIOS, Comparison, run_comparison, upcycling_results

METHODS = ("source_only", "upcycling")


PUBLISHED = architectures.SMALL_PV_RCNN_PUBLISHED_DETECTOR
VARIANTS = {
    "undefended": PUBLISHED,
    "no_raw_stride_2": architectures.coarse_keypoints(PUBLISHED, 2),
    "no_raw_stride_4": architectures.coarse_keypoints(PUBLISHED, 4),
}


def main() -> None:
    """Run what is missing and print means and paired differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenario", choices=[name for name in SCENARIOS if not SCENARIOS[name].partial], default="waymo_lyft")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    scenario, size = SCENARIOS[options.scenario], SimulationSize()

    def data(seed: int) -> ExperimentData:
        folder = options.out / "data" / f"seed{seed}"
        return simulated_adaptation(folder, scenario.source, scenario.target, size=size, seed=seed, classes=("Car",), workers=1)

    for seed in options.seeds:
        for name in options.variants:
            folder = options.out / name
            comparison = Comparison(scenario=scenario, preset=replace(DEMO_PV_RCNN, detector=VARIANTS[name]), size=size)
            run = RunOptions(say=lambda text, name=name: print(f"{name}: {text}", flush=True), processes=options.processes)
            run_comparison(comparison, data, METHODS, seed, jobs=folder / "jobs", results=folder / "results", options=run)
    scores = {}
    for name in options.variants:
        comparison = Comparison(scenario=scenario, preset=replace(DEMO_PV_RCNN, detector=VARIANTS[name]), size=size)
        scores[name] = upcycling_results(comparison.cache(options.out / name / "results"))
    for method in METHODS:
        for metric in next(iter(scores[options.variants[0]][method].values())).student:
            base = None
            for name in options.variants:
                values = np.array([scores[name][method][seed].student[metric] for seed in options.seeds])
                base = values if base is None else base
                change = values - base
                spread = (
                    (lambda v: f"{v.mean():6.1f} ± {v.std(ddof=1):4.1f}") if len(values) > 1 else (lambda v: f"{v.mean():6.1f}")
                )
                print(f"{method:12} {metric:14} {name:18} {spread(values)}   paired difference {spread(change)}")


if __name__ == "__main__":
    main()

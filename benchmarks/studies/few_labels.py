"""What a few labeled frames of the target bring, which frames to ask for, and how to train on them: AP over seeds.

    python benchmarks/studies/few_labels.py --out runs/few_labels [--scenario waymo_compact] [--seeds 0 1 2] [--csv FILE]

The source model saw objects of any size and is told nothing of the target. It looks at the fleet's smashed scenes and asks for frames by a
rule of `upcycle3d select`; the raw frames of these scenes are labeled. Their number grows, and the frames of a small number are among those
of a larger one. Three ways to learn from them:

- `fine_tuning`: the decoder goes on, on these frames alone.
- `calibrated`: UpCycling at estimated sizes; every second labeled frame is one of these, and F-GT pastes their objects too.
- `iou_match`: semi-supervised training on *raw* unlabeled scans (as 3DIoUMatch), with these frames in its labeled half.

Written before the first run: `calibrated` is expected above `fine_tuning` by 5 points of 3D AP at an IoU of 0.7 with 10 frames, and frames
chosen by `informative` above random ones by more than the spread over seeds. Both are falsified where the interval of the paired difference
over seeds includes the smaller value.

Every result is stored as soon as it is known, so the command may be stopped and given again.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

from upcycle3d.core.strict_json import read_json
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.datasets.kitti import KittiDataset
from upcycle3d.datasets.prepare import prepare
from upcycle3d.perception.recipes.experiment_data import SimulationSize, simulated_adaptation
from upcycle3d.perception.recipes.job_folder import PipelineConfig, RunOptions
from upcycle3d.perception.recipes.labeled_half import TargetLabels
from upcycle3d.perception.recipes.method_run import MethodRun
from upcycle3d.perception.recipes.pipeline import Pipeline
from upcycle3d.perception.recipes.presets import PRESETS
from upcycle3d.perception.recipes.result_csv import CsvRow, read_rows, write_rows
from upcycle3d.perception.recipes.upcycling_experiment import SCENARIOS, Scenario, protocol_for, source_preset
from upcycle3d.perception.server.scene_choice import ChoiceRule, SceneChoiceConfig, choose_scenes
from upcycle3d.perception.server.scene_views import view_scenes
from upcycle3d.perception.training.detector_files import load_detector

PRESET = PRESETS["small"]
METRICS = ("Car 3D 0.7", "Car BEV 0.7", "Car 3D 0.5", "Car BEV 0.5")


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a training learns from the asked frames."""

    method: str
    """A name of `METHODS`."""
    share: float
    """Share of the labeled frames that are asked ones."""


WAYS = {
    "fine_tuning": Way(method="source_continued", share=1.0),
    "calibrated": Way(method="upcycling_calibrated", share=0.5),
    "iou_match": Way(method="iou_match", share=0.5),
}


def pipeline_of(folder: Path, scenario: Scenario, seed: int) -> Pipeline:
    """Data, source model and smashed scenes of one seed."""
    classes = PRESET.detector.class_names
    data = simulated_adaptation(
        folder / "data", scenario.source, scenario.target, size=SimulationSize(), seed=seed, classes=classes
    )
    config = PipelineConfig(
        labeled=data.labeled,
        fleet=data.fleet,
        validation=data.validation,
        protocol=protocol_for(scenario, data.validation.open()),
        preset=source_preset(PRESET, "random_sizes", scenario),
        seed=seed,
    )
    pipeline = Pipeline(config, folder / "random_sizes", RunOptions(processes=1))
    pipeline.train_source_model()
    pipeline.extract_fleet()
    return pipeline


def asked_frames(pipeline: Pipeline, rule: ChoiceRule, number: int) -> list[str]:
    """Ids of the frames that a rule asks for, most useful first."""
    job = pipeline.job
    teacher = load_detector(job.source_model)
    store = job.store(teacher)
    choice = choose_scenes(view_scenes(store, teacher), SceneChoiceConfig(number=number, rule=rule, seed=job.config.seed))
    frames = read_json(job.receipts, "the receipts of an extraction", remedy="extract again")
    return [frames[store[scene.position].scene_id] for scene in choice.chosen]


def labeled(config: PipelineConfig, ids: list[str], folder: Path) -> DataSplit:
    """The asked frames as a prepared dataset of their own."""
    fleet = config.fleet.open()
    source = KittiDataset(config.fleet.root.parent / "raw", tuple(ids), classes=fleet.classes, z_shift=fleet.rig.z_shift)
    prepare(source, ids, folder, splits={"train": ids}, classes=fleet.classes, workers=0)
    return DataSplit(root=folder, name="train")


def keep_rows(path: Path, rows: list[CsvRow]) -> None:
    """Write the rows, with those of other scenarios and seeds that the file holds already."""
    ran = {(row["scenario"], str(row["seed"])) for row in rows}
    earlier = read_rows(path) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, [*(row for row in earlier if (row["scenario"], row["seed"]) not in ran), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenario", choices=[name for name, s in SCENARIOS.items() if not s.partial], default="waymo_compact")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--numbers", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument(
        "--rules", choices=["informative", "doubt", "diverse", "random"], nargs="+", default=["informative", "random"]
    )
    parser.add_argument("--ways", choices=list(WAYS), nargs="+", default=list(WAYS))
    parser.add_argument("--csv", type=Path, help="also keep the rows here, beside those of other scenarios and seeds")
    arguments = parser.parse_args()
    rows: list[CsvRow] = []
    for seed in arguments.seeds:
        folder = arguments.out / arguments.scenario / f"seed{seed}"
        pipeline = pipeline_of(folder, SCENARIOS[arguments.scenario], seed)
        cells = {"source_0": ("source", "-", 0), "calibrated_0": ("calibrated", "-", 0)}
        runs = {
            "source_0": MethodRun(method="source_only", upcycle=PRESET.upcycle),
            "calibrated_0": MethodRun(method="upcycling_calibrated", upcycle=PRESET.upcycle),
        }
        for rule in arguments.rules:
            frames = asked_frames(pipeline, rule, max(arguments.numbers))
            if len(frames) < max(arguments.numbers):
                raise SystemExit(f"{rule} finds only {len(frames)} scenes that differ; lower --numbers")
            for number in arguments.numbers:
                split = labeled(pipeline.job.config, frames[:number], folder / f"asked_{rule}_{number}")
                for way in arguments.ways:
                    name = f"{way}_{rule}_{number}"
                    target = TargetLabels(data=split, share=WAYS[way].share)
                    runs[name] = MethodRun(method=WAYS[way].method, upcycle=PRESET.upcycle, target=target)
                    cells[name] = (way, rule, number)
        for name, result in pipeline.results(runs):
            way, rule, number = cells[name]
            scores = {metric: round(result.student[metric], 2) for metric in METRICS}
            rows.append({"scenario": arguments.scenario, "seed": seed, "way": way, "rule": rule, "frames": number, **scores})
            print(name, scores, flush=True)
            keep_rows(arguments.csv or arguments.out / "results.csv", rows)


if __name__ == "__main__":
    main()

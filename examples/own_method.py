"""One UpCycling run with your own augmentation of features and your own pseudo-label rule.

python examples/own_method.py [OUT] [STEPS]
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import upcycle3d
from upcycle3d.core.features import CutFeatures
from upcycle3d.datasets.simulation.places import KITTI
from upcycle3d.datasets.simulation.simulate import SimulatedDataset
from upcycle3d.perception.server.methods import METHODS
from upcycle3d.perception.server.upcycle_config import UpcycleConfig

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("out", nargs="?", type=Path, default=Path("own_method"), help="folder to write")
parser.add_argument("steps", nargs="?", type=int, default=20, help="training steps")
options = parser.parse_args()
out = options.out
source = Path(__file__).parent / "detector.safetensors"


def brighter(scene: CutFeatures, labels: upcycle3d.Labels, rng: np.random.Generator) -> tuple[CutFeatures, upcycle3d.Labels]:
    """Scale all features of a scene by up to 10 percent. Boxes keep their places, so the labels stay as they are."""
    voxels = replace(scene.voxels, features=scene.voxels.features * rng.uniform(0.9, 1.1))
    return replace(scene, voxels=voxels), labels


def nearest_ten(found: upcycle3d.Predictions, config: UpcycleConfig) -> upcycle3d.Labels:
    """Trust the ten nearest teacher boxes. They are not exact, and what they miss is not background."""
    near = found.select(torch.linalg.vector_norm(found.boxes.data[:, :2], dim=1).argsort()[:10])
    return upcycle3d.Labels.make(near.boxes.data, near.classes, exact=False, complete=False)


frames = SimulatedDataset(domain=KITTI, seed=7, num_frames=10, classes=("Car",))
ids = [f"{index:06d}" for index in range(len(frames))]
upcycle3d.prepare(frames, ids, out / "data", splits={"train": ids[:5], "fleet": ids[5:]}, classes=("Car",), workers=1)

extractor = upcycle3d.Extractor(upcycle3d.load_detector(source).encoder, upcycle3d.RigSpec(), "fp16")
with extractor.shard_writer(out / "shards") as writer:
    upcycle3d.extract([frames[index].points for index in range(5, 10)], extractor, writer)
upcycle3d.ingest(out / "shards", out / "store", expected_fingerprint=extractor.fingerprint, expected_spec=extractor.spec)

mine = replace(METHODS["upcycling"], summary="brighter features, ten boxes", augmentation=brighter, label_rule=nearest_ten)
outcome = upcycle3d.upcycle(
    "kitti_small", out / "data", source, out / "run", method=mine, store=out / "store", steps=options.steps, progress=False
)
print(f"{outcome.steps} steps on {outcome.frames} labeled frames and {outcome.scenes} scenes; student: {out / 'run'}")

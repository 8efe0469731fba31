"""Train a detector on your own dataset class. Anything with a length whose items are frames will do.

python examples/own_dataset.py [OUT] [STEPS]
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import upcycle3d


class ParkingLot:
    """A made-up dataset: one parked car per frame, as points on the sides of a box, on a flat floor."""

    ids = tuple(f"{i:03d}" for i in range(12))  # one unique name per frame

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> upcycle3d.Frame:
        random = np.random.default_rng(index)
        x, y, yaw = random.uniform(8, 30), random.uniform(-10, 10), random.uniform(-np.pi, np.pi)
        size = np.array([4.2, 1.8, 1.6])
        surface = random.uniform(-0.5, 0.5, (600, 3))
        side = random.integers(0, 2, 600)  # put each point on a long or on a short side of the car
        surface[np.arange(600), side] = np.sign(surface[np.arange(600), side]) / 2
        car = surface * size
        turned = np.stack(
            [car[:, 0] * np.cos(yaw) - car[:, 1] * np.sin(yaw), car[:, 0] * np.sin(yaw) + car[:, 1] * np.cos(yaw)], 1
        )
        car = np.concatenate([turned + np.array([x, y]), car[:, 2:] + 0.8], 1)
        floor = np.concatenate([random.uniform((0, -20), (40, 20), (3000, 2)), random.normal(0, 0.02, (3000, 1))], 1)
        box = torch.tensor([[x, y, 0.8, *size, yaw]], dtype=torch.float32)
        return upcycle3d.Frame(
            id=self.ids[index],
            points=upcycle3d.PointCloud.from_array(np.concatenate([floor, car]), columns=("x", "y", "z")),
            labels=upcycle3d.Labels.make(box, torch.zeros(1), num_points=torch.tensor([600])),
        )


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("out", nargs="?", type=Path, default=Path("parking_lot"), help="folder to write")
parser.add_argument("steps", nargs="?", type=int, default=200, help="training steps")
options = parser.parse_args()
out = options.out
frames = ParkingLot()
upcycle3d.prepare(frames, frames.ids, out / "data", classes=("Car",), splits={"train": frames.ids[:10], "val": frames.ids[10:]})
outcome = upcycle3d.train("small", f"{out / 'data'}:train", out / "run", steps=options.steps, progress=False)
print(f"{outcome.steps} steps on {outcome.frames} frames in {outcome.seconds:.0f} s; loss {sum(outcome.loss.values()):.2f}")

last = frames[len(frames) - 1]
found = outcome.detector.detect(last.points)
picture = upcycle3d.draw_bev(out / "parking_lot.png", last.points, labels=last.labels, predictions=found, class_names=("Car",))
print(f"{len(found)} detections; picture: {picture}")

"""Find objects in one scan and draw them.

    python examples/detect.py                       # a simulated scan and the small detector of this folder
    python examples/detect.py SCAN.bin --detector runs/source --out picture.png

The detector of this folder was trained on simulated scans only. It shows how things work and finds few cars in real scans.
"""

import argparse
from pathlib import Path

import upcycle3d

HERE = Path(__file__).parent


def simulated_scan() -> upcycle3d.PointCloud:
    """One simulated turn of a KITTI-like LiDAR, cut to what a front camera sees."""
    from upcycle3d.datasets.simulation.places import KITTI
    from upcycle3d.datasets.simulation.simulate import simulate_frame

    return simulate_frame(KITTI, seed=5, index=0, view="camera").frame.points


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("scan", nargs="?", help="scan file (.bin, .npy, .pcd); a simulated scan by default")
parser.add_argument("--detector", default=HERE / "detector.safetensors", help="run folder or detector file")
parser.add_argument("--out", default="detect.png", help="picture to write")
options = parser.parse_args()

detector = upcycle3d.load_detector(options.detector)
scan = upcycle3d.PointCloud.from_file(options.scan) if options.scan else simulated_scan()
found = detector.detect(scan)

for box, number, score in zip(found.boxes.data.tolist(), found.classes.tolist(), found.scores.tolist()):
    if score >= 0.3:
        x, y, z, length, width, height, yaw = box
        print(
            f"{detector.class_names[number]} {score:.2f}: center {x:.1f} {y:.1f} {z:.1f} m, "
            f"size {length:.1f} x {width:.1f} x {height:.1f} m, yaw {yaw:.2f} rad"
        )
picture = upcycle3d.draw_bev(options.out, scan, predictions=found, class_names=detector.class_names)
print(f"{len(scan)} points, {int((found.scores >= 0.3).sum())} objects with a score of at least 0.3; picture: {picture}")

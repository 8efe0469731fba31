"""Find objects in one scan and draw them.

    python examples/detect.py                       # a simulated scan and the small detector of this folder
    python examples/detect.py SCAN.bin --detector runs/source --out picture.png

The detector of this folder was trained on simulated scans only. It shows how things work; it finds few cars in real scans.
"""

import argparse
from pathlib import Path

import upcycle3d
from upcycle3d.core.point_files import read_scan
from upcycle3d.core.rig import RigSpec
from upcycle3d.datasets.simulation.places import KITTI
from upcycle3d.datasets.simulation.simulate import simulate_frame

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("scan", nargs="?", help="scan file (.bin, .npy, .pcd); a simulated scan by default")
parser.add_argument("--detector", default=Path(__file__).parent / "detector.safetensors", help="run folder or detector file")
parser.add_argument("--out", default="detect.png", help="picture to write")
options = parser.parse_args()

detector = upcycle3d.load_detector(options.detector)
rig = detector.trained_on.rig if detector.trained_on else RigSpec()  # mounting height and intensity scale of the training's scans
if options.scan:
    read, counts = read_scan(options.scan)
    print(f"{counts.points} points read, {counts.points - len(read)} of them without a return")
    scan, labels, names = rig.from_sensor(read), None, detector.class_names
else:  # what a front camera sees of one turn of a LiDAR like KITTI's, with the true boxes
    made = simulate_frame(KITTI, seed=5, index=3, view="camera")
    scan, labels, names = made.frame.points, made.frame.labels, made.class_names  # class 0 is Car in both
found = detector.detect(scan)

sure = found.select(found.scores >= 0.3)
boxes = rig.to_sensor(sure.boxes) if options.scan else sure.boxes  # in the frame of the file
for box, number, score in zip(boxes.data.tolist(), sure.classes.tolist(), sure.scores.tolist()):
    x, y, z, length, width, height, yaw = box
    print(
        f"{detector.class_names[number]} {score:.2f}: center ({x:.1f}, {y:.1f}, {z:.1f}) m, "
        f"size {length:.1f} x {width:.1f} x {height:.1f} m, yaw {yaw:.2f} rad"
    )
picture = upcycle3d.draw_bev(options.out, scan, labels=labels, predictions=found, class_names=names)
print(f"{len(scan)} points, {len(sure)} objects with a score of at least 0.3; picture: {picture}")

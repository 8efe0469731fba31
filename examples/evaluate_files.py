"""Score detection files in KITTI's text format. No GPU and no compiled code of your own is needed.

python examples/evaluate_files.py LABELS DETECTIONS IDS.txt     # folders of ID.txt files
python examples/evaluate_files.py                               # simulated labels and detections of a small detector
"""

import sys
import tempfile
from pathlib import Path

import upcycle3d
from upcycle3d.datasets.kitti import read_ids
from upcycle3d.datasets.kitti_text import predictions_to_kitti, write_objects
from upcycle3d.datasets.simulation.places import KITTI
from upcycle3d.datasets.simulation.simulate import simulate_frame, virtual_camera
from upcycle3d.perception.evaluation.kitti import LOOSE, OFFICIAL, evaluate_kitti_folders


def simulated_files(folder: Path) -> tuple[Path, Path, list[str]]:
    """Write labels of twenty simulated frames, and the detections of the small detector of this folder."""
    detector = upcycle3d.load_detector(Path(__file__).parent / "detector.safetensors")
    ids = []
    for index in range(20):
        made = simulate_frame(KITTI, seed=5, index=index, view="camera")
        ids.append(made.frame.id)
        write_objects(folder / "labels" / f"{made.frame.id}.txt", made.objects.select(made.in_picture()))
        found = predictions_to_kitti(detector.detect(made.frame.points), detector.class_names, virtual_camera())
        write_objects(folder / "detections" / f"{made.frame.id}.txt", found)
    return folder / "labels", folder / "detections", ids


with tempfile.TemporaryDirectory() as temporary:
    if len(sys.argv) > 3:
        labels, detections, ids = Path(sys.argv[1]), Path(sys.argv[2]), list(read_ids(Path(sys.argv[3])))
    else:
        labels, detections, ids = simulated_files(Path(temporary))
    for name, overlaps in (("official, IoU 0.7", OFFICIAL), ("loose, IoU 0.5", LOOSE)):
        car = evaluate_kitti_folders(labels, detections, ids, classes=("Car",), min_overlaps=overlaps).classes["Car"]
        print(
            f"Car, {name}: 3D AP {car.box_3d.r40[1]:.1f}, BEV AP {car.bev.r40[1]:.1f} (moderate, {car.ground_truths[1]} objects)"
        )

"""What leaves a vehicle: make smashed scenes of a few scans, write a shard, take it in, and read the features as numpy arrays.

python examples/smash.py [OUT]
"""

import sys
from pathlib import Path

import numpy as np

import upcycle3d
from upcycle3d.datasets.simulation.places import KITTI
from upcycle3d.datasets.simulation.simulate import simulate_frame
from upcycle3d.perception.server.ingest import ingest
from upcycle3d.perception.vehicle.extractor import extract
from upcycle3d.perception.wire.shards import ShardWriter

out = Path(sys.argv[1] if len(sys.argv) > 1 else "smashed")
detector = upcycle3d.load_detector(Path(__file__).parent / "detector.safetensors")

# On the vehicle: only the encoder is needed. A real vehicle reads it with upcycle3d.load_encoder("encoder.safetensors").
extractor = upcycle3d.Extractor(detector.encoder, codec="int8")
scans = [simulate_frame(KITTI, seed=5, index=index, view="camera").frame.points for index in range(3)]
with ShardWriter(out / "shards", spec=extractor.spec, fingerprint=extractor.fingerprint, codec="int8") as writer:
    report = extract(scans, extractor, writer)
print(
    f"{report.frames} scans, {report.raw_bytes_per_frame:.0f} bytes each as points, {report.smashed_bytes_per_frame:.0f} as features"
)

# On the server: every shard is verified before a scene enters the store.
ingest(out / "shards", out / "store", expected_fingerprint=extractor.fingerprint, expected_spec=extractor.spec)
store = upcycle3d.SmashedStore(out / "store")
for scene in (store[index] for index in range(len(store))):
    cells: np.ndarray = scene.coords.numpy()  # (M, 3) int32 z, y, x of the grid at the cut
    features: np.ndarray = scene.features.numpy()  # (M, C) float32
    print(f"scene {scene.scene_id[:8]}: {len(cells)} cells, features {features.shape}, mean {features.mean():.3f}")

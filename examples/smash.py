"""What leaves a vehicle: smash a few scans, write a shard, take it in on the server, and read the features as numpy arrays.

python examples/smash.py [OUT]
"""

import argparse
from pathlib import Path

import upcycle3d
from upcycle3d.datasets.simulation.places import KITTI
from upcycle3d.datasets.simulation.simulate import simulate_frame

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("out", nargs="?", type=Path, default=Path("smashed"), help="folder to write")
out = parser.parse_args().out

# On the vehicle. A real vehicle has only the encoder file: Extractor.from_file("encoder.safetensors", ...).
encoder = upcycle3d.load_detector(Path(__file__).parent / "detector.safetensors").encoder
extractor = upcycle3d.Extractor(encoder, upcycle3d.RigSpec(), "int8")
scans = [simulate_frame(KITTI, seed=5, index=index, view="camera").frame.points for index in range(3)]
with extractor.shard_writer(out / "shards") as writer:
    report = upcycle3d.extract(scans, extractor, writer)
print(f"{report.frames} scans: {report.raw_bytes_per_frame:.0f} bytes per scan, {report.smashed_bytes_per_frame:.0f} per scene")

# On the server: every byte of a shard is verified before a scene enters the store.
upcycle3d.ingest(out / "shards", out / "store", expected_fingerprint=extractor.fingerprint, expected_spec=extractor.spec)
store = upcycle3d.SmashedStore(out / "store")
for index in range(len(store)):
    scene = store[index]
    cells = scene.coords.numpy()  # (M, 3) int32: z, y, x of the grid at the cut
    features = scene.features.numpy()  # (M, C) float32
    print(f"scene {scene.scene_id[:8]}: {len(cells)} cells, features {features.shape}, mean {features.mean():.3f}")

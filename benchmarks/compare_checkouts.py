"""Do two checkouts of this repository compute the same? Data, training, predictions, shards and upcycling, compared bit by bit.

    python benchmarks/compare_checkouts.py OLD NEW [--detector second_iou|pv_rcnn|both] [--work DIR]

For a change that must not change a number: files that move, names, a new command line. OLD simulates a few scans and does the whole
job on them with the small presets: prepare, 20 steps of training, predict, extract (both codecs), ingest, 20 steps of upcycling. NEW
does each of these steps again from OLD's result of the step before, so that a difference shows in the line of the step that made it.
One line a comparison; the exit code is 1 if anything differs. Both run on the CPU with the same seeds and one thread a command; the
two detectors are done side by side. ``--threads 2`` also takes the parallel paths of the operators, but PV-RCNN's training does not
repeat itself there: torch adds up gradients of indexing (``points[index]``) in whatever order threads come.

What is random by design is compared without it: scenes have random identifiers and lie in random order in shards of random names, so
they are put in the order of their content; upcycling visits scenes in the order of the store, so both upcycle from OLD's store.

OLD's results stay in ``--work`` under a name made of its source, and another NEW is compared without running OLD again. The order of
folders, the command line and the names that a checkout has are found out in ``module``, ``Checkout.options`` and ``probe_detections``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Values = Mapping[str, Any]
"""Name -> array, text or number."""

Z_SHIFT = 1.73  # m, of the simulated KITTI sensor
SPLITS = {"train": 4, "fleet": 3, "val": 2}
STEPS = 20
CODECS = {"fp16": "scans", "int8": "prepared"}  # codec -> what is extracted with it
STORED = {"second_iou": "fp16", "pv_rcnn": "int8"}  # detector -> codec of the store it upcycles from
PRESETS = {"second_iou": "small", "pv_rcnn": "small_pv_rcnn"}
# A detector of so few steps is sure of nothing: with the preset's thresholds it would give no pseudo label.
THRESHOLDS = {"iou-score": 0.2, "class-score": 0.0, "ignore": 0.1}
SOURCE = ("ops", "core", "datasets", "perception", "tools")


# ------------------------------------------------------------------------------------------------- the two layouts


def module(new: str, old: str) -> Any:
    """A module of the checkout under test by its name in the new layout, else in the old one."""
    try:
        return importlib.import_module(f"upcycle3d.{new}")
    except ModuleNotFoundError:
        return importlib.import_module(f"upcycle3d.{old}")


@dataclass(frozen=True)
class Checkout:
    """A checkout at ``root``, importable as ``upcycle3d`` through the folder ``link``. home: where its results go."""

    root: Path
    home: Path
    link: Path
    threads: int

    def options(
        self, command: str, *, detector: Path | None = None, data: Path | None = None, split: str | None = None
    ) -> list[str]:
        """How this checkout's command names a run folder and a split of prepared data.

        The old layout says ``--encoder``, ``--checkpoint`` and ``--data DIR --split NAME``, the new one ``--detector`` and
        ``--data DIR:NAME`` everywhere. Fields of the command's options tell, because folders moved before options changed.
        """
        fields = re.findall(r"^    (\w+): ", (self.root / "tools" / f"{command}.py").read_text(), re.MULTILINE)
        found: list[str] = []
        if detector is not None:
            found += [
                "--" + next((name for name in ("detector", "encoder", "checkpoint") if name in fields), "detector"),
                str(detector),
            ]
        if data is not None and split is not None and "split" not in fields:
            found += ["--data", f"{data}:{split}"]
        elif data is not None:
            found += ["--data", str(data), *(["--split", split] if split else [])]
        return found

    def z_shift(self, command: str) -> str:
        """How this checkout's command names the mounting height: flat since scan options are the same everywhere."""
        text = (self.root / "tools" / f"{command}.py").read_text()
        return "--rig.z-shift" if re.search(r"^    rig: RigSpec = field\(", text, re.MULTILINE) else "--z-shift"

    # ---- running it

    def run(self, command: str, *arguments: object) -> None:
        """``upcycle3d COMMAND ARGUMENTS`` of this checkout."""
        self._python("-m", "upcycle3d.tools.main", command, *arguments)

    def probe(self, what: str, *arguments: object) -> Values:
        """The values that a function of ``PROBES`` reads with this checkout's own code."""
        with tempfile.TemporaryDirectory(dir=self.home) as folder:
            out = Path(folder) / "values.npz"
            self._python(__file__, "--probe", what, out, *arguments)
            with np.load(out, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}

    def _python(self, *arguments: object) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("UPCYCLE3D")} | {
            "PYTHONPATH": str(self.link),
            "PYTHONDONTWRITEBYTECODE": "1",  # nothing is written into the checkout
            "NUMBA_CACHE_DIR": str(self.link / "numba"),
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-P", *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=self.link, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-12:]
            raise Failed(" ".join(command[2:]) + "".join(f"\n    {line}" for line in said))


class Failed(Exception):
    """A command of a checkout that ended with an error."""


def checkout(root: Path, work: Path, threads: int, *, old: bool) -> Checkout:
    """The checkout at ``root`` with its folders in ``work``, named after its source. What NEW left there before goes."""
    root = root.resolve()
    if not (root / "tools" / "main.py").is_file():
        sys.exit(f"{root} is no checkout of upcycle3d: it has no tools/main.py")
    key = source_key(root, threads)
    home, link = work / f"{'old' if old else 'new'}-{key}", work / f"link-{key}-{'old' if old else 'new'}"
    if not old and home.exists():
        shutil.rmtree(home)
    home.mkdir(parents=True, exist_ok=True)
    link.mkdir(exist_ok=True)
    (link / "upcycle3d").unlink(missing_ok=True)
    (link / "upcycle3d").symlink_to(root, target_is_directory=True)
    made = Checkout(root, home, link, threads)
    found = str(made.probe("place")["folder"])
    if Path(found).resolve() != root:
        sys.exit(f"asked for {root}, Python imports upcycle3d from {found}")
    return made


def source_key(root: Path, threads: int) -> str:
    """A name for the results of a checkout: its source, the settings above, and what else decides the bits."""
    import torch  # takes seconds

    settings = (Z_SHIFT, SPLITS, STEPS, CODECS, STORED, PRESETS, THRESHOLDS)
    machine = (torch.__version__, torch.backends.cpu.get_cpu_capability(), np.__version__, sys.version, threads)
    digest = hashlib.sha256(repr((settings, machine)).encode())
    for path in [root / "__init__.py", *sorted(p for part in SOURCE for p in (root / part).rglob("*.py"))]:
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


# ------------------------------------------------------------------- what a checkout's own code reads, in its own process


def probe_place() -> Values:
    import upcycle3d

    return {"folder": str(Path(upcycle3d.__file__).parent)}


def probe_prepared(root: str) -> Values:
    """Points, labels, calibration, fingerprints and objects to paste of a prepared dataset."""
    from upcycle3d.datasets.gt_database import GtDatabase
    from upcycle3d.datasets.prepared import PreparedDataset

    values: dict[str, Any] = {}
    for split in SPLITS:
        frames = PreparedDataset(Path(root), split)
        values[f"{split}/fingerprint"], values[f"{split}/ids"] = frames.split_fingerprint(), np.array(frames.ids)
        for i, name in enumerate(frames.ids):
            frame = frames[i]
            values[f"{split}/{name}/xyz"], values[f"{split}/{name}/features"] = frame.points.xyz, frame.points.features
            values[f"{split}/{name}/boxes"] = frame.labels.boxes.data
            for column in ("classes", "num_points", "difficulty", "weight", "exact", "box_weight", "complete"):
                values[f"{split}/{name}/{column}"] = getattr(frame.labels, column)
            for column in ("lidar_to_camera", "projection", "image_size"):
                values[f"{split}/{name}/{column}"] = getattr(frame.calibration, column)
    database = GtDatabase(Path(root) / "gt_database" / "train")
    for i in range(len(database)):
        found = database[i]
        values[f"object {i}/box"], values[f"object {i}/class"] = found.box, found.class_index
        values[f"object {i}/xyz"], values[f"object {i}/features"] = found.points.xyz, found.points.features
    return values


def probe_fingerprint(run: str) -> Values:
    """The fingerprint of the encoder that goes to the fleet."""
    encoder = module("perception.wire.encoder_file", "perception.vehicle.encoder_file").load_encoder(
        Path(run) / "encoder.safetensors"
    )
    fingerprint = importlib.import_module("upcycle3d.perception.models.encoders.fingerprint")
    return {"fingerprint": fingerprint.encoder_fingerprint(encoder, _rig())}


def probe_detections(run: str, scans: str) -> Values:
    """What the detector finds in scans, before anything is rounded for a file."""
    from upcycle3d.perception.training.detector_files import load_detector

    read_points, rig = module("core.point_files", "datasets.point_files").read_points, _rig()
    shifted = rig.from_sensor if hasattr(rig, "from_sensor") else rig.apply
    loaded, values = load_detector(Path(run)), {}
    detector = loaded[0] if isinstance(loaded, tuple) else loaded  # the old layout gives its configuration too
    for path in sorted(Path(scans).glob("*.bin")):
        (found,) = detector.detect([shifted(read_points(path))])
        values[f"{path.stem}/boxes"] = found.boxes.data
        for column in ("classes", "scores", "class_scores", "iou_scores"):
            values[f"{path.stem}/{column}"] = getattr(found, column)
    return values


def probe_shards(folder: str) -> Values:
    """Every scene of the shards in a folder, in the order of content."""
    codec = module("perception.wire.codec", "perception.vehicle.codec")
    manifests = module("perception.wire.manifest", "perception.vehicle.manifest")
    shards = module("perception.wire.shards", "perception.vehicle.shards")
    scenes = []
    for path in Path(folder).glob("*.json"):
        manifest = manifests.read_manifest(path)
        for _, blob in shards.read_members(path.parent / manifest.tar_name, manifest):
            kind = {"expected_spec": manifest.spec, "expected_fingerprint": manifest.encoder_fingerprint}
            scenes.append(codec.decode_scene(blob, **kind))
    return _scenes(scenes)


def probe_store(folder: str) -> Values:
    """Every scene of a store, in the order of content."""
    from upcycle3d.perception.server.store import SmashedStore

    store = SmashedStore(Path(folder))
    return _scenes([store[i] for i in range(len(store))])


def _scenes(scenes: list[Any]) -> Values:
    columns = ("coords", "features", "keypoint_cells", "keypoint_features")
    values = {}
    parts = [
        {c: getattr(s, c).numpy() for c in columns} | {"codec": s.codec, "fingerprint": s.encoder_fingerprint} for s in scenes
    ]
    for i, part in enumerate(sorted(parts, key=lambda p: [hashlib.sha256(p[c].tobytes()).digest() for c in columns])):
        values |= {f"scene {i}/{name}": value for name, value in part.items()}
        values[f"scene {i}/SHA-256"] = hashlib.sha256(b"".join(part[c].tobytes() for c in columns)).hexdigest()
    return values


def _rig() -> Any:
    return module("core.rig", "perception.models.encoders.fingerprint").RigSpec(z_shift=Z_SHIFT)


PROBES: dict[str, Callable[..., Values]] = {
    "place": probe_place,
    "prepared": probe_prepared,
    "fingerprint": probe_fingerprint,
    "detections": probe_detections,
    "shards": probe_shards,
    "store": probe_store,
}


# ------------------------------------------------------------------------------------------------- what is made and compared


def make(folder: Path, fill: Callable[[Path], object]) -> Path:
    """``folder``, filled unless it is there; it gets its name when it is complete."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        fill(unfinished)
        unfinished.rename(folder)
    return folder


def prepared(by: Checkout, old: Path) -> dict[str, Values]:
    def fill(out: Path) -> None:
        by.run("prepare", "kitti", old / "raw", "--out", out, "--classes", "Car", "--z-shift", Z_SHIFT, "--workers", 1)

    return {"prepared data": by.probe("prepared", make(by.home / "prepared", fill))}


def trained(by: Checkout, old: Path, kind: str) -> dict[str, Values]:
    def fill(out: Path) -> None:
        data = by.options("train", data=old / "prepared", split="train")
        by.run("train", PRESETS[kind], *data, "--out", out, "--preset.train.loop.optim.total-steps", STEPS, "--workers", 0)

    run = make(by.home / kind / "trained", fill)
    return {
        f"detector after {STEPS} steps": load_file(run / "detector.safetensors"),
        "encoder of the fleet": load_file(run / "encoder.safetensors"),
        "fingerprint of the encoder": by.probe("fingerprint", run),
    }


def predicted(by: Checkout, old: Path, kind: str) -> dict[str, Values]:
    run, scans = old / kind / "trained", old / "raw" / "training" / "velodyne_reduced"

    def fill(out: Path) -> None:
        detector = by.options("predict", detector=run)
        by.run("predict", *detector, "--scans", scans, by.z_shift("predict"), Z_SHIFT, "--min-score", 0, "--out", out)

    written: dict[str, Any] = {}
    for path in sorted(make(by.home / kind / "boxes", fill).glob("*.json")):
        for i, box in enumerate(json.loads(path.read_text())):
            written |= {f"{path.stem}/{i}/{name}": value for name, value in box.items()}
    return {"files of predict": written, "detections before rounding": by.probe("detections", run, scans)}


def extracted(by: Checkout, old: Path, kind: str) -> dict[str, Values]:
    values = {}
    for codec, source in CODECS.items():

        def fill(out: Path, codec: str = codec, source: str = source) -> None:
            scans: list[object] = [
                "--scans",
                old / "raw" / "training" / "velodyne_reduced",
                "--ids",
                old / "raw" / "ImageSets" / "fleet.txt",
            ]
            scans += [by.z_shift("extract"), Z_SHIFT]
            data = scans if source == "scans" else by.options("extract", data=old / "prepared", split="fleet")
            detector = by.options("extract", detector=old / kind / "trained")
            by.run("extract", *detector, *data, "--codec", codec, "--out", out)

        shards = make(by.home / kind / f"shards_{codec}", fill)
        values[f"scenes of extract from {source}, {codec}"] = by.probe("shards", shards)
    return values


def ingested(by: Checkout, old: Path, kind: str) -> dict[str, Values]:
    def fill(out: Path) -> None:
        incoming = by.home / kind / "incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        shutil.copytree(old / kind / f"shards_{STORED[kind]}", incoming)  # ingest moves what it takes
        detector = by.options("ingest", detector=old / kind / "trained")
        by.run("ingest", incoming, "--store", out, *detector, by.z_shift("ingest"), Z_SHIFT)

    return {"store of the old shards": by.probe("store", make(by.home / kind / "store", fill))}


def upcycled(by: Checkout, old: Path, kind: str) -> dict[str, Values]:
    def fill(out: Path) -> None:
        inputs = by.options("upcycle", detector=old / kind / "trained", data=old / "prepared", split="train")
        inputs += ["--store", str(old / kind / "store"), by.z_shift("upcycle"), str(Z_SHIFT)]
        changes = [f"--preset.upcycle.thresholds.0.{name}={value}" for name, value in THRESHOLDS.items()]
        changes += [f"--preset.upcycle.loop.optim.total-steps={STEPS}", f"--preset.upcycle.round-steps={STEPS}"]
        by.run("upcycle", PRESETS[kind], *inputs, "--method", "upcycling", "--out", out, *changes, "--workers", 0)

    run = make(by.home / kind / "upcycled", fill)
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        f"student after {STEPS} steps of upcycling": load_file(run / "detector.safetensors"),
        f"teacher after {STEPS} steps of upcycling": load_file(run / "teacher.safetensors"),
        "pseudo labels of upcycling": next(r for r in rounds if r["kind"] == "pseudo_labels"),
    }


def first_difference(old: Values, new: Values) -> str | None:
    """Where two sets of values differ first, in any bit, and by how much; None if nowhere."""
    for name in [*old, *(n for n in new if n not in old)]:
        if name not in old or name not in new:
            return f"{name} is only in the {'new' if name in new else 'old'} one"
        a, b = np.asarray(old[name]), np.asarray(new[name])
        if a.dtype.kind == b.dtype.kind == "U" and a.shape == b.shape:
            if (a != b).any():
                return f"{name} is {a!s:.80} in the old one, {b!s:.80} in the new one"
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name} is {a.dtype} {a.shape} in the old one, {b.dtype} {b.shape} in the new one"
        elif a.tobytes() != b.tobytes():  # NaN equals itself, and 0 is not -0
            x, y = (np.atleast_1d(v).astype(np.float64) for v in (a, b))
            return f"{name}: {int((x != y).sum())} of {a.size} values, by up to {np.abs(x - y).max():.3g}"
    return None


def compare(stage: Callable[..., dict[str, Values]], old: Checkout, new: Checkout, *kind: str) -> bool:
    """Let both do a stage, print a line for each of its results, and tell whether all are equal."""
    expected = stage(old, old.home, *kind)
    try:
        found = stage(new, old.home, *kind)
    except Failed as error:
        print(f"{' '.join([*kind, stage.__name__])}: the new checkout failed: {error}", flush=True)
        return False
    equal = True
    for what, values in expected.items():
        difference = first_difference(values, found[what]) if values else "there is nothing to compare"
        unit = "tensors" if all(np.asarray(v).dtype.kind != "U" for v in values.values()) else "values"
        print(f"{', '.join([*kind, what])}: {difference or f'equal: {len(values):,} {unit}'}", flush=True)
        equal &= difference is None
    return equal


def main() -> int:
    if sys.argv[1:2] == ["--probe"]:
        what, out, *arguments = sys.argv[2:]
        np.savez(out, **{name: np.asarray(value) for name, value in PROBES[what](*arguments).items()})
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD", help="checkout that is right")
    parser.add_argument("new", type=Path, metavar="NEW", help="checkout that must give the same")
    parser.add_argument("--detector", choices=(*PRESETS, "both"), default="both")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/compare_checkouts"), help="folder for what both make; OLD's part is kept"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of every command")
    arguments = parser.parse_args()
    start, work = time.perf_counter(), arguments.work.resolve()
    old, new = (checkout(root, work, arguments.threads, old=root is arguments.old) for root in (arguments.old, arguments.new))
    sizes = [str(word) for split in SPLITS.items() for word in split]
    raw = ("simulate", "--domain", "kitti", "--frames", sum(SPLITS.values()), "--seed", 3, "--splits", *sizes, "--workers", 1)
    make(old.home / "raw", lambda out: old.run(*raw, "--out", out))
    equal = [compare(prepared, old, new)]

    def whole_job(kind: str) -> bool:
        return all([compare(stage, old, new, kind) for stage in (trained, predicted, extracted, ingested, upcycled)])

    with ThreadPoolExecutor() as pool:  # each only waits for its processes
        equal += pool.map(whole_job, PRESETS if arguments.detector == "both" else (arguments.detector,))
    print(f"{'everything is equal' if all(equal) else 'there are DIFFERENCES'}; {time.perf_counter() - start:.0f} s")
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())

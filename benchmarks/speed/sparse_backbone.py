"""Speed of SECOND's sparse backbone on the CPU: our operators with all threads compared with spconv's CPU wheel with one.

    python benchmarks/speed/sparse_backbone.py [--json FILE]

spconv gets one thread because its CPU code gives wrong results with more. Its backward needs a stub for the CUDA stream that it asks for.
Each side runs in a child process and they take turns, so that a busy machine slows both. Ours runs with OMP_WAIT_POLICY=passive; without
it torch's idle threads spin and, on a shared machine, take the cores from the working ones. The forward includes building the
rulebooks; batch norm is in training mode. The scan is simulated: 64 beams over a ground plane with cars, walls and poles.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from upcycle3d.ops.sparse_conv import StridedConv3d, SubmanifoldConv3d
from upcycle3d.perception.recipes.speed import cpu_name

SHAPE = (41, 1600, 1408)  # KITTI: 0.1 x 0.05 x 0.05 m, one more cell in z
LOW, VOXEL = np.array([0.0, -40.0, -3.0]), np.array([0.05, 0.05, 0.1])

# VoxelBackBone8x of OpenPCDet: stage, in, out, kernel, stride (None: submanifold), padding
LAYERS: list[tuple[str, int, int, tuple[int, int, int], Any, Any]] = [
    ("subm1", 4, 16, (3, 3, 3), None, None),
    ("subm1", 16, 16, (3, 3, 3), None, None),
    ("spconv2", 16, 32, (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ("subm2", 32, 32, (3, 3, 3), None, None),
    ("subm2", 32, 32, (3, 3, 3), None, None),
    ("spconv3", 32, 64, (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ("subm3", 64, 64, (3, 3, 3), None, None),
    ("subm3", 64, 64, (3, 3, 3), None, None),
    ("spconv4", 64, 64, (3, 3, 3), (2, 2, 2), (0, 1, 1)),
    ("subm4", 64, 64, (3, 3, 3), None, None),
    ("subm4", 64, 64, (3, 3, 3), None, None),
    ("spconv_out", 64, 128, (3, 1, 1), (2, 1, 1), (0, 0, 0)),
]


class Backbone(nn.Module):
    """The twelve layers with our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for _, inputs, outputs, kernel, stride, padding in LAYERS:
            conv = (
                SubmanifoldConv3d(inputs, outputs, kernel)
                if stride is None
                else StridedConv3d(inputs, outputs, kernel, stride, padding)
            )
            self.convs.append(conv)
            self.norms.append(nn.BatchNorm1d(outputs, eps=1e-3, momentum=0.01))

    def forward(self, features: Tensor, coords: Tensor) -> tuple[Tensor, Tensor, list[tuple[str, int, int]]]:
        """Features and coordinates of the last stage, and (stage, sites, pairs) of every rulebook."""
        shape, built, sizes = SHAPE, "", []
        for (stage, *_), conv, norm in zip(LAYERS, self.convs, self.norms):
            if stage != built:
                rulebook = conv.rulebook(coords, shape, 1)
                built, coords, shape = stage, rulebook.out_coords, rulebook.out_shape
                sizes.append((stage, rulebook.num_out, rulebook.starts[-1]))
            features = torch.relu(norm(conv(features, rulebook)))
        return features, coords, sizes


def spconv_backbone() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The same with spconv; parameters in the same order."""
    import spconv.pytorch as spconv
    from spconv.pytorch import ops

    ops.get_current_stream = lambda: 0  # the CPU wheel's backward asks for a CUDA stream that does not exist
    modules: list[nn.Module] = []
    for stage, inputs, outputs, kernel, stride, padding in LAYERS:
        if stride is None:
            conv = spconv.SubMConv3d(inputs, outputs, kernel, bias=False, indice_key=stage)
        else:
            conv = spconv.SparseConv3d(inputs, outputs, kernel, stride, padding, bias=False, indice_key=stage)
        modules += [conv, nn.BatchNorm1d(outputs, eps=1e-3, momentum=0.01), nn.ReLU()]
    net = spconv.SparseSequential(*modules)

    def forward(features: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
        out = net(spconv.SparseConvTensor(features, coords, list(SHAPE), 1))
        return out.features, out.indices

    forward.net = net  # type: ignore[attr-defined]
    return forward


def scan(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Voxels (features (M, 4): mean x, y, z, intensity; coords (M, 4) int32) of a simulated 64-beam scan."""
    rng = np.random.default_rng(seed)
    elevation = np.radians(np.linspace(2.0, -24.8, 64))[:, None]
    azimuth = np.radians(np.arange(-45, 45, 0.057))[None, :]
    rays = np.stack(
        np.broadcast_arrays(np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)), -1
    )
    rays = rays.reshape(-1, 3)
    reach = np.where(rays[:, 2] < 0, -1.73 / np.minimum(rays[:, 2], -1e-9), np.inf)
    for size, count in (((3.9, 1.6, 1.56), 25), ((0.3, 0.3, 6.0), 25), ((12.0, 1.0, 4.0), 12), ((1.5, 1.5, 2.5), 25)):
        for _ in range(count):
            half = np.array(size if rng.random() < 0.7 else (size[1], size[0], size[2])) / 2
            center = np.array([rng.uniform(16, 70), rng.uniform(-38, 38), half[2] - 1.73])
            if abs(center[1]) < half[1] + 2 and center[0] < 25:
                continue  # a free lane ahead
            with np.errstate(divide="ignore", invalid="ignore"):
                near, far = np.sort([(center - half) / rays, (center + half) / rays], axis=0)
            enter, leave = near.max(axis=1), far.min(axis=1)
            reach = np.where((enter > 0) & (enter < leave), np.minimum(reach, enter), reach)
    seen = reach < 80
    points = rays[seen] * (reach[seen] + rng.normal(0, 0.02, seen.sum()))[:, None]
    points[:, 2] += 0.15 * np.sin(points[:, 0] / 7) * np.cos(points[:, 1] / 9) + rng.normal(0, 0.01, len(points))  # rough ground
    cells = np.floor((points - LOW) / VOXEL).astype(np.int64)[:, ::-1]  # z, y, x
    inside = ((cells >= 0) & (cells < np.array([40, *SHAPE[1:]]))).all(axis=1)
    cells, values = cells[inside], np.column_stack([points, rng.random(len(points))])[inside]
    keys, place, count = np.unique(np.ravel_multi_index(tuple(cells.T), SHAPE), return_inverse=True, return_counts=True)
    means = np.stack([np.bincount(place, values[:, c]) / count for c in range(4)], axis=1)
    coords = np.stack([np.zeros_like(keys), *np.unravel_index(keys, SHAPE)], axis=1)
    return torch.from_numpy(means).float(), torch.from_numpy(coords).int()


def seconds(forward: Callable[..., Any], net: nn.Module, features: Tensor, coords: Tensor, backward: bool) -> float:
    """Wall time of one pass."""
    net.zero_grad()
    begin = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = forward(features, coords)[0]
        if backward:
            out.sum().backward()
    return time.perf_counter() - begin


def child(side: str, folder: Path) -> None:
    """One side: write the output once, then run one pass per line of standard input and answer with its seconds."""
    data = load_file(folder / "in.safetensors")
    forward: Callable[..., Any]
    net: nn.Module
    if side == "ours":
        forward = net = Backbone()
    else:
        forward = spconv_backbone()
        net = forward.net  # type: ignore[attr-defined]
    for name, parameter in zip(sorted(key for key in data if key.startswith("p")), in_order(net)):
        parameter.data.copy_(data[name])
    features, coords = forward(data["features"], data["coords"])[:2]
    save_file({"features": features.detach().contiguous(), "coords": coords.contiguous()}, folder / f"{side}.safetensors")
    print("ready", flush=True)
    for line in sys.stdin:
        print(seconds(forward, net, data["features"], data["coords"], line.strip() == "backward"), flush=True)


def in_order(net: nn.Module) -> list[nn.Parameter]:
    """The parameters layer by layer (weight, then batch norm's scale and shift), on both sides."""
    if isinstance(net, Backbone):
        return [p for conv, norm in zip(net.convs, net.norms) for p in (conv.weight, norm.weight, norm.bias)]
    return list(net.parameters())


class Side:
    """A child process that answers with the seconds of a pass."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str]) -> None:
        command = [sys.executable, __file__, "--child", name, str(folder)]
        self.process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        while self._read().strip() != "ready":
            pass

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process stopped; to see why, run: {' '.join(map(str, self.process.args))}")  # type: ignore[arg-type]
        return line

    def run(self, mode: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(mode + "\n")
        self.process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Maximum difference of the two outputs after bringing spconv's rows into our order."""
    order = np.lexsort(theirs["coords"].numpy().T[::-1])
    if not torch.equal(theirs["coords"][order], ours["coords"]):
        raise SystemExit("spconv and we disagree on the occupied sites")
    return float((theirs["features"][order] - ours["features"]).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]))
        return

    torch.manual_seed(0)
    features, coords = scan()
    net = Backbone()
    _, _, sizes = net(features, coords)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = {f"p{i:02d}": p.detach() for i, p in enumerate(in_order(net))}
        save_file({"features": features, "coords": coords} | parameters, folder / "in.safetensors")
        sides = {
            "spconv": Side("spconv", folder, {"OMP_NUM_THREADS": "1"}),
            "ours": Side("ours", folder, {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive"}),
        }
        apart = difference(load_file(folder / "ours.safetensors"), load_file(folder / "spconv.safetensors"))
        times: dict[str, list[float]] = {}
        for _ in range(options.repeats + 1):
            for mode in ("forward", "backward"):
                for label, side in sides.items():
                    times.setdefault(f"{label} {mode}", []).append(side.run(mode))
        for side in sides.values():
            side.close()

    median = {key: statistics.median(values[1:]) * 1000 for key, values in times.items()}  # the first round warms up
    result = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": {"ours": options.threads, "spconv": 1},
        "omp_wait_policy": {"ours": "passive", "spconv": "default"},
        "load_average": os.getloadavg(),
        "voxels": len(coords),
        "rulebooks": [{"stage": stage, "sites": sites, "pairs": count} for stage, sites, count in sizes],
        "max_difference": apart,
        "median_ms": median,
        "ratio": {mode: median[f"ours {mode}"] / median[f"spconv {mode}"] for mode in ("forward", "backward")},
        "all_ms": {key: [round(v * 1000, 1) for v in values[1:]] for key, values in times.items()},
    }
    print(f"{result['cpu']}, {os.cpu_count()} cores, torch {torch.__version__}, load average {os.getloadavg()[0]:.1f}")
    print("sites / pairs:", ", ".join(f"{stage} {sites} / {count // 1000}k" for stage, sites, count in sizes))
    print(f"maximum difference of the outputs {apart:.1e}")
    for mode, label in (("forward", "forward"), ("backward", "forward + backward")):
        ours, theirs = median[f"ours {mode}"], median[f"spconv {mode}"]
        print(
            f"{label:20s} ours ({options.threads} threads) {ours:6.0f} ms   spconv (1 thread) {theirs:6.0f} ms   ratio {ours / theirs:.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

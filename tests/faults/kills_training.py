"""Kills of `train` and `upcycle`: the weights at the end are those of a run that nobody killed, bit for bit."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  takes seconds to import, which a kill must not wait for

import tiny
from faults.killing import KillCase
from upcycle3d.perception.recipes.jobs import train_preset
from upcycle3d.perception.recipes.upcycling_job import upcycle_preset
from upcycle3d.perception.training.detector_files import load_detector, save_run_detector

STEPS = 4


@cache
def _made_once() -> Path:
    """Prepared frames, a source model and a store, which every killed run gets a copy of."""
    root = Path(mkdtemp())
    tiny.prepared(root / "data").ensure_gt_database()
    detector = tiny.preset().detector.build().eval()
    save_run_detector(root / "source", detector)
    tiny.store(root / "fleet", detector, [tiny.scan_with_car(seed) for seed in range(4)])
    # All kernels are loaded here, so that a fork does not wait for them.
    warm = Path(mkdtemp())
    _inputs_from(root, warm)
    _train(warm)
    shutil.rmtree(warm / "run")
    _upcycle(warm)
    shutil.rmtree(warm)
    return root


def _inputs_from(made: Path, root: Path) -> None:
    shutil.copytree(made, root, dirs_exist_ok=True)


def _inputs(root: Path) -> None:
    _inputs_from(_made_once(), root)


def _train(root: Path) -> None:
    train_preset(tiny.preset(steps=STEPS), f"{root}/data:train", root / "run", resume=True, progress=False)


def _upcycle(root: Path) -> None:
    upcycle_preset(
        tiny.preset(steps=STEPS),
        f"{root}/data:train",
        root / "source",
        root / "run",
        store=root / "fleet" / "store",
        resume=True,
        progress=False,
    )


def _weights(root: Path) -> dict[str, list[float] | str]:
    """All weights of the result, and whether anything half written was left."""
    found: dict[str, list[float] | str] = {}
    for file in ("detector.safetensors", "teacher.safetensors"):
        if (root / "run" / file).exists():
            state = load_detector(root / "run" / file).state_dict()
            found |= {f"{file} {name}": t.double().view(-1).tolist() for name, t in state.items() if t.numel()}
    litter = [str(p.relative_to(root)) for p in (root / "run").rglob("*") if "tmp" in p.name]
    return found | {"litter": " ".join(litter)}


TRAIN = KillCase(name="train", inputs=_inputs, begin=_train, go_on=_train, result=_weights)
UPCYCLE = KillCase(name="upcycle", inputs=_inputs, begin=_upcycle, go_on=_upcycle, result=_weights)


def _kill(case: KillCase, seed: int) -> str:
    from faults.killing import kill_once, measure

    torch.set_num_threads(1)
    return kill_once(case, measure(case), seed).fault


def kill_train(seed: int) -> str:
    """Kill a training at moments that the seed decides, and go on; returns what is wrong afterwards, empty where all is well."""
    return _kill(TRAIN, seed)


def kill_upcycle(seed: int) -> str:
    """The same for `upcycle`."""
    return _kill(UPCYCLE, seed)

"""The one program: `upcycle3d COMMAND …`.

Only the module of the given command is imported, so `--help` is fast and the vehicle loads no server code. To add a command, write one file in
this folder with an options dataclass and a function `command`, and add a line to `COMMANDS`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Collection

from .. import __version__

# Set before torch starts its thread pool: threads that wait by spinning take the cores from everything else on a shared machine
# (measured next to another process: steps of 4 s instead of 0.4 s). Set the variable yourself to use another policy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Command: (module, one line). The module's function `command` is the command.
COMMANDS = {
    "demo": ("demo", "the whole job on simulated data in a few minutes, with a report"),
    "simulate": ("simulate", "write a simulated LiDAR dataset in the layout of KITTI, Waymo or Lyft"),
    "prepare": ("prepare", "read, check and split a dataset once, and build its object database; resumable"),
    "train": ("train", "train a detector on labeled frames"),
    "import": ("import_weights", "load weights of OpenPCDet or mmdetection3d (SECOND, SECOND-IoU, PV-RCNN) as a detector"),
    "import infos": ("import_infos", "turn an info file (.pkl) of OpenPCDet or mmdetection3d into a folder that `prepare` reads"),
    "import results": (
        "import_results",
        "turn results (.pkl) of OpenPCDet or mmdetection3d into detections that `evaluate` reads",
    ),
    "export": ("export", "write a checkpoint of a run as detector and encoder files"),
    "export onnx": ("export_onnx", "write the server half of a detector as ONNX graphs, compared in onnxruntime"),
    "export aoti": ("export_aoti", "compile the vehicle half of a detector for C++ (AOTInductor), compared with the original"),
    "export openpcdet": ("export_openpcdet", "write the weights of a detector as a checkpoint of OpenPCDet"),
    "export mmdet3d": ("export_mmdet3d", "write the weights of a detector as a checkpoint of mmdetection3d"),
    "export infos": ("export_infos", "write a prepared dataset as an info file of OpenPCDet or mmdetection3d"),
    "export results": ("export_results", "write detections as a result file of OpenPCDet or mmdetection3d"),
    "defend": ("defend", "limit what the encoder of a detector lets out: region upload, noise, fewer channels and others"),
    "extract": ("extract", "vehicle: turn scans into shards of smashed scenes"),
    "conformance write": ("conformance_write", "write golden scans and scenes, to check another implementation of the exporter"),
    "conformance check": ("conformance_check", "run any exporter on golden scans and compare the shards that it writes"),
    "mix": ("mix", "gateway: shuffle the scenes of many vehicles into new shards"),
    "ingest": ("ingest", "server: verify shards, quarantine bad ones, add the rest to a store"),
    "select": ("select", "name the stored scenes whose raw frames are worth a label (active learning)"),
    "upcycle": ("upcycle", "train on labeled frames and smashed scenes, by UpCycling or a baseline (--method)"),
    "moe dmu": ("moe_dmu", "upcycle a Hugging Face CLIP to experts that tell apart what the base cannot; resumable"),
    "moe bam": ("moe_bam", "train specialists of a Hugging Face Llama, and mix them with their attentions (BAM)"),
    "moe baseline": ("moe_baseline", "make a baseline of a Llama: sparse upcycling, BTX, soup and others; Mixtral out"),
    "moe report": ("moe_report", "say how a language mixture uses its experts, what it costs and how good it is"),
    "moe readme": (
        "moe_readme",
        "carve experts for domains out of a Hugging Face Llama, with a router that decides ahead (Read-ME)",
    ),
    "moe carve": ("moe_carve", "carve a detector by driving context, with a gate that knows the context before the network runs"),
    "moe serve": ("moe_serve", "answer requests with a carved language model or detector within a memory budget"),
    "moe simulate": ("moe_simulate", "compare policies, caches and fetching ahead on a trace, in simulated time"),
    "moe detector": ("moe_detector", "join detectors of several domains to one with an upcycled head of experts"),
    "audit": ("audit", "measure what uploads give away, with and without defences: attacks, bytes, and AP; resumable"),
    "bench ops": ("bench_ops", "measure how fast the operators are"),
    "bench step": ("bench_step", "measure a training step of a detector"),
    "bench extract": ("bench_extract", "measure an extraction: milliseconds and bytes per scan"),
    "experiment upcycling": ("experiment_upcycling", "compare UpCycling with its baselines over seeds; resumable"),
    "experiment category-shift": (
        "experiment_category_shift",
        "compare decisions on unknown classes (GLC) over seeds; resumable",
    ),
    "experiment report": ("experiment_report", "print the tables of an experiment from its results.csv"),
    "adapt features": ("adapt", "GLC: label target features when the classes differ too"),
    "adapt detector": ("adapt_detector", "GLC on a detector's proposals: labels and unknown scores on another domain"),
    "predict": ("predict", "find objects in a scan or in a folder of scans"),
    "evaluate": ("evaluate", "compute AP by the protocol of KITTI, Waymo, Lyft or ST3D"),
    "inspect": ("inspect", "say what a shard, a folder of shards, a store, run folder, detector or prepared dataset holds"),
    "view": ("view", "draw frames, scans or smashed scenes: pictures, a page for a browser, Rerun, PLY, glTF"),
    "completion": ("completion", "print a script that completes commands and options in bash, zsh or fish"),
    "doctor": ("doctor", "say what is installed and which backends run"),
}

# Commands of an earlier version, and what to write now.
RENAMED_COMMANDS = {"bench upcycling": "experiment upcycling"}

# First words of other commands that are commands too, and take a word of their own: `import openpcdet FILE PRESET`.
TAKE_A_WORD = ("import",)


def main() -> None:
    """Entry point of the `upcycle3d` program."""
    try:
        try:
            _main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any more, as in `upcycle3d --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"upcycle3d {__version__}")
        return
    name, rest = arguments[0], arguments[1:]
    if " ".join(arguments[:2]) in COMMANDS:  # a command of two words
        name, rest = " ".join(arguments[:2]), arguments[2:]
    if " ".join(arguments[:2]) in RENAMED_COMMANDS:
        old = " ".join(arguments[:2])
        print(f"error: there is no command {old!r} any more; write {RENAMED_COMMANDS[old]!r}", file=sys.stderr)
        sys.exit(2)
    group = [c for c in COMMANDS if c.startswith(f"{name} ")]
    # `export` is a command and the first word of others: `export onx` is none of them.
    misspelt = group and rest and not rest[0].startswith("-") and name not in TAKE_A_WORD
    if name not in COMMANDS or misspelt:
        if group and (not rest or rest[0] in ("-h", "--help")):
            print(_usage(group))
            sys.exit(0 if rest else 2)
        name = " ".join(arguments[:2]) if group else name
        near = difflib.get_close_matches(name, COMMANDS, 1) or group
        hint = f"; did you mean {near[0]!r}?" if near else "."
        print(f"error: there is no command {name!r}{hint} Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    from .console import run_command

    try:
        module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    except OSError as error:  # a library that must write a file when it is loaded
        print(f"error: {name} cannot start, because a library finds no folder that it can write: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == __package__.partition(".")[0]:
            raise  # a file of this program is missing
        print(
            f"error: {name} cannot start, because the package {error.name} is not installed for {sys.executable}. What this program needs is "
            "installed by: pip install -c constraints.txt -e . (`upcycle3d doctor` lists the packages)",
            file=sys.stderr,
        )
        sys.exit(2)
    parsed_as = getattr(module, "ARGUMENTS", None)
    code = run_command(module.command, rest, program=f"upcycle3d {name}", parsed_as=parsed_as)
    if code == 128 + signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not change what the first one ended with
    sys.exit(code)


def _usage(names: Collection[str] = COMMANDS) -> str:
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {COMMANDS[name][1]}" for name in names]
    return "\n".join(
        [
            "upcycle3d: learn from a fleet's LiDAR without collecting raw point clouds",
            "",
            "usage: upcycle3d COMMAND [OPTIONS]      (upcycle3d COMMAND --help explains each)",
            "",
            *lines,
        ]
    )


if __name__ == "__main__":
    main()

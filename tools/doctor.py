"""`upcycle3d doctor`: what is installed here, which backends run, and how long imports take."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from .backend_checks import WRONG, check_backends
from .console import console, print_table, print_warning, run_command, write_json
from .installed_packages import wanted_packages

# What is timed: a statement in a fresh interpreter.
VEHICLE_SET = "import upcycle3d.perception.vehicle.extractor"
FULL_PROGRAM = (
    "import importlib; from upcycle3d.tools.main import COMMANDS; "
    "[importlib.import_module(f'upcycle3d.tools.{module}') for module, _ in COMMANDS.values()]"
)
IMPORTS = {
    "import upcycle3d": "import upcycle3d",
    "upcycle3d --help": "import sys; sys.argv = ['upcycle3d', '--version']; from upcycle3d.tools.main import main; main()",
    "torch alone": "import torch",
    "the vehicle's set": VEHICLE_SET,
    "the full program": FULL_PROGRAM,
}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Print versions of all packages and extras, devices and import times, and compare the backends with their references."""

    repeats: int = 3
    """How often each import is timed; the shortest time is printed. 0 skips the timing."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def command(config: Doctor) -> None:
    """Say what is installed, which backends run, and how long imports take."""
    core, *extras = wanted_packages().items() or [("", [])]
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count(), "torch threads": torch.get_num_threads(), "cuda": cuda}  # fmt: skip
    checks = check_backends()
    print_table("machine", ("what", "value"), list(machine.items()))
    print_table("packages", ("package", "version"), [(one.name, one.state) for one in core[1]])
    optional = [(f"[{extra}]", one.name, one.state) for extra, packages in extras for one in packages]
    print_table("extras (each: pip install PACKAGE)", ("extra", "package", "version"), optional)
    print_table("backends", ("what", "result"), list(checks.items()))
    wrong = [name for name, said in checks.items() if said.startswith(WRONG)]
    if wrong:
        print_warning(
            f"on this machine these compute something else than their references, so do not use them: {', '.join(wrong)}"
        )
    times = {name: import_seconds(code, config.repeats) for name, code in IMPORTS.items()} if config.repeats else {}
    if times:
        share = times["the vehicle's set"] / times["the full program"]
        rows = [(name, f"{seconds:.2f}") for name, seconds in times.items()]
        print_table("imports in a fresh interpreter, shortest of several", ("what", "seconds"), rows)
        console.print(f"the vehicle's set takes {100 * share:.0f} % of the time of the full program")
    missing = [one.name for one in core[1] if not one.serves]
    if missing:
        print_warning(f"a core package is missing or too old: {', '.join(missing)}; run pip install -c constraints.txt -e .")
    if not core[1]:
        print_warning(
            "this program is not installed, and no pyproject.toml lies beside it, so the packages that it needs are not known"
        )
    found = {extra: {one.name: one.found for one in packages} for extra, packages in extras}
    versions = {one.name: one.found for one in core[1]}
    write_json(
        config.json, {"machine": machine, "packages": versions, "extras": found, "checks": checks, "import_seconds": times}
    )


def import_seconds(code: str, repeats: int) -> float:
    """Time a statement in fresh interpreters. The shortest time says most: other work on the machine only adds.

    Args:
        code: The statement.
        repeats: How often it is timed.

    Returns:
        The shortest time in seconds, without the start of the interpreter.
    """
    command = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    runs = (subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True) for _ in range(repeats))
    return min(float(run.stdout.split()[-1]) for run in runs)


if __name__ == "__main__":
    sys.exit(run_command(command))

"""`make faults`: damage inputs of every reader and kill every job for some minutes, and print what became of them.

One process damages inputs, the other kills. The exit code is 1 if there is a fault; each fault names the seed that repeats it:

    python -m faults --reader "detector file" --seed 12345
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from faults.fuzzing import Tally, fuzz, limit_memory
from faults.kill_cases import CASES
from faults.killing import KillOutcome, kill_once, measure
from faults.readers import READERS


def main() -> int:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one campaign per seed")
    parser.add_argument("--reader", help="damage only inputs of this reader")
    parser.add_argument("--seed", type=int, help="one damaged input of --reader, to repeat a fault")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    readers = [reader for reader in READERS if options.reader in (None, reader.name)]
    if options.seed is not None:
        tallies = {reader.name: _fuzz_one(reader, options.seed) for reader in readers}
        _print(tallies, {})
        return int(any(t.faults for t in tallies.values()))
    tallies, kills = {reader.name: Tally() for reader in readers}, {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "kills.json"
            child = os.fork() if options.reader is None else 0
            if child == 0 and options.reader is None:
                code = 1
                try:
                    results.write_text(json.dumps(_kill_all(seed, time.monotonic() + 60 * options.minutes)))
                    code = 0
                except BaseException:  # nothing may run on in the fork
                    traceback.print_exc()
                finally:
                    os._exit(code)
            _fuzz_all(readers, seed, time.monotonic() + 60 * options.minutes, tallies)
            if child:
                _, status = os.waitpid(child, 0)
                if status or not results.exists():
                    raise SystemExit("the process that kills jobs ended with an error; see above")
                for name, (starts, killed, faults) in json.loads(results.read_text()).items():
                    old = kills.get(name, (0, 0, []))
                    kills[name] = (old[0] + starts, old[1] + killed, old[2] + faults)
    _print(tallies, kills)
    if options.json:
        options.json.write_text(json.dumps(_values(tallies, kills), indent=1) + "\n")
    return int(any(t.faults for t in tallies.values()) or any(faults for _, _, faults in kills.values()))


def _fuzz_one(reader: Any, seed: int) -> Tally:
    with tempfile.TemporaryDirectory() as folder:
        return fuzz(reader, Path(folder), iter((seed,)), until=time.monotonic() + 60, most=1)


def _fuzz_all(readers: list[Any], seed: int, until: float, tallies: dict[str, Tally]) -> None:
    """Give every reader turns of two seconds until the time is over. Each turn is a fork, so a crash or a leak ends only the turn."""
    turns = itertools.count()
    while time.monotonic() < until:
        turn = next(turns)
        for reader in readers:
            if time.monotonic() >= until:
                return
            tallies[reader.name].merge(_turn(reader, (seed * 1000 + turn) * 1_000_000))


def _turn(reader: Any, first_seed: int) -> Tally:
    with tempfile.TemporaryDirectory() as folder:
        work, result = Path(folder) / "work", Path(folder) / "tally.json"
        work.mkdir()
        reader.make(work)  # in this process, so that what is made once is made once
        shutil.rmtree(work)
        work.mkdir()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                limit_memory()
                tally = fuzz(reader, work, itertools.count(first_seed), until=time.monotonic() + 2.0, most=10**9)
                result.write_text(json.dumps(vars(tally)))
                code = 0
            except BaseException:  # nothing may run on in the fork
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status or not result.exists():
            return Tally(inputs=1, faults=[f"CRASH with status {status}: {reader.name}, from seed {first_seed}"])
        return Tally(**json.loads(result.read_text()))


def _kill_all(seed: int, until: float) -> dict[str, tuple[int, int, list[str]]]:
    undisturbed = {case.name: measure(case) for case in CASES}
    found: dict[str, tuple[int, int, list[str]]] = {case.name: (0, 0, []) for case in CASES}
    for turn in itertools.count():
        for case in CASES:
            if time.monotonic() >= until:
                return found
            number = seed * 1_000_000 + turn
            outcome: KillOutcome = kill_once(case, undisturbed[case.name], number)
            starts, killed, faults = found[case.name]
            new = [f"{case.name}, seed {number}: {outcome.fault}"] if outcome.fault else []
            found[case.name] = (starts + 1, killed + outcome.killed, faults + new)
    return found


def _print(tallies: dict[str, Tally], kills: dict[str, tuple[int, int, list[str]]]) -> None:
    print("| reader | protected | inputs | refused | same value | other value | faults | peak MB | slowest s |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    protected = {reader.name: reader.protected for reader in READERS}
    total = Tally()
    for name, t in tallies.items():
        total.merge(t)
        mark = "yes" if protected[name] else "no"
        print(
            f"| {name} | {mark} | {t.inputs} | {t.refused} | {t.same} | {t.other} | {len(t.faults)} | {t.peak_mb:.0f} | {t.slowest:.2f} |"
        )
    t = total
    print(f"| all | | {t.inputs} | {t.refused} | {t.same} | {t.other} | {len(t.faults)} | {t.peak_mb:.0f} | {t.slowest:.2f} |")
    if kills:
        print("\n| job | runs | kills | faults |\n| --- | ---: | ---: | ---: |")
        for name, (starts, killed, faults) in kills.items():
            print(f"| {name} | {starts} | {killed} | {len(faults)} |")
        print(
            f"| all | {sum(k[0] for k in kills.values())} | {sum(k[1] for k in kills.values())} | {sum(len(k[2]) for k in kills.values())} |"
        )
    seen: set[str] = set()
    for fault in [*total.faults, *(f for k in kills.values() for f in k[2])]:
        kind = fault.split(": ")[0] + fault.split(", ")[0]
        if kind not in seen:
            seen.add(kind)
            print(fault)


def _values(tallies: dict[str, Tally], kills: dict[str, tuple[int, int, list[str]]]) -> dict[str, Any]:
    return {
        "readers": {name: vars(tally) for name, tally in tallies.items()},
        "kills": {name: {"runs": k[0], "kills": k[1], "faults": k[2]} for name, k in kills.items()},
    }


if __name__ == "__main__":
    sys.exit(main())

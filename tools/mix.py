"""`upcycle3d mix`: a gateway shuffles the scenes of many vehicles into new shards. Read next: `perception/server/mix.py`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from ..core.errors import InvalidInput, UpcycleError
from ..perception.server.mix import FEWEST_SHARDS, mix
from .console import console, print_table, print_warning, run_command, write_json

_LISTED = 30


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Mix finished shards of many vehicles into new ones, so that a shard no longer stands for one vehicle. The features still tell which
    scenes are alike. The mixed shards are removed from the folders that are given."""

    incoming: tyro.conf.Positional[tuple[Path, ...]]
    """Folders with uploaded shards, one for each vehicle or one for all. No upload into them may be running."""
    out: Path
    """Folder for the new shards, for `ingest`."""
    fewest_shards: int = FEWEST_SHARDS
    """Shards of one encoder, cut, codec and sampling rule that must be there; fewer wait for more. Shards are counted, not vehicles:
    set it higher than the number of shards that a few vehicles send."""
    scenes_per_shard: int = 256
    """Largest number of scenes of a new shard."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def command(config: Mix) -> None:
    """Mix shards. It is safe to run this again, also after a crash."""
    if not config.incoming:
        raise InvalidInput("no folder is given; name the folders that the vehicles upload to")
    report = mix(config.incoming, config.out, fewest_shards=config.fewest_shards, scenes_per_shard=config.scenes_per_shard)
    write_json(config.json, asdict(report))
    if report.completed:
        console.print("a run that had died was completed first")
    console.print(
        f"{report.scenes} scenes of {report.sources} shards are in {len(report.shards)} new shards in {config.out}; the {report.sources} old ones "
        "were removed",
        soft_wrap=True,
    )
    if report.unmixed:
        rows = [(shard.manifest, shard.reason) for shard in report.unmixed[:_LISTED]]
        more = len(report.unmixed) - len(rows)
        print_table("stay where they are", ("shard", "why"), [*rows, *([("…", f"and {more} more")] if more else [])])
    if report.shards:
        console.print(
            f"next, on the server: upcycle3d ingest {shlex.quote(str(config.out))} --store STORE --detector DETECTOR; the detector is the run folder "
            "or encoder file that the vehicles extract with",
            soft_wrap=True,
        )
    else:
        if report.unmixed:
            raise UpcycleError(f"nothing was mixed: {len(report.unmixed)} shards stay where they are, with the reasons above")
        print_warning("there is nothing to mix: no shard lies in the folders that were given")


if __name__ == "__main__":
    sys.exit(run_command(command))

"""`upcycle3d ingest`: the server takes shards in after it has verified every byte. Read next: `perception/server/ingest.py`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro

from ..core.errors import UpcycleError
from ..core.rig import RigSpec
from ..perception.models.encoders.fingerprint import encoder_fingerprint
from ..perception.server.ingest import ingest
from ..perception.wire.encoder_file import load_encoder
from .console import console, print_table, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class Ingest:
    """Verify uploaded shards and move them into a store. A shard that fails goes to STORE/quarantine with the reason."""

    incoming: tyro.conf.Positional[Path]
    """Folder with the uploaded shards."""
    store: Path
    """Folder of the store."""
    detector: Path
    """Run folder of the detector whose encoder the fleet runs, or the encoder file alone. Features of another encoder are refused."""
    rig: RigSpec = field(default_factory=RigSpec)
    """The fleet's rig, the same as in `extract`."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def command(config: Ingest) -> None:
    """Take shards in. It is safe to run this again, also after a crash."""
    encoder = load_encoder(config.detector)
    report = ingest(
        config.incoming,
        config.store,
        expected_fingerprint=encoder_fingerprint(encoder, config.rig),
        expected_spec=encoder.spec,
    )
    print_table(
        "shards",
        ("accepted", "already there", "quarantined", "waiting", "new scenes", "scenes in store"),
        [
            (
                len(report.accepted),
                len(report.already_there),
                len(report.quarantined),
                len(report.waiting),
                report.new_scenes,
                report.total_scenes,
            )
        ],
    )
    for title, refusals in (("quarantined", report.quarantined), ("waiting", report.waiting)):
        if refusals:
            print_table(title, ("shard", "why"), [(r.shard[:16], r.reason) for r in refusals])
    console.print(f"store: {config.store}")
    write_json(config.json, asdict(report))
    if report.quarantined and not (report.accepted or report.already_there):
        raise UpcycleError(
            f"no shard was accepted; the {len(report.quarantined)} refused ones are in {config.store}/quarantine with the reasons. If they "
            "name another encoder, the detector or the rig differs: give the same --detector and --rig options as in `extract`, and move "
            "the shards back"
        )


if __name__ == "__main__":
    sys.exit(run_command(command))

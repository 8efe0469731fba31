"""``upcycle3d ingest``: the server side takes shards in, after verifying every byte."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro

from ..core.rig import RigSpec
from ..perception.models.encoders.fingerprint import encoder_fingerprint
from ..perception.server.ingest import ingest
from ..perception.wire.encoder_file import load_encoder
from .console import console, print_table, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class Ingest:
    """Verify uploaded shards and move them into a store; what fails goes to STORE/quarantine with the reason."""

    incoming: tyro.conf.Positional[Path]
    """folder with uploaded shards"""
    store: Path
    """folder of the store"""
    encoder: Path
    """the encoder the fleet runs (encoder.safetensors or its run folder); features of any other are refused"""
    rig: RigSpec = field(default_factory=RigSpec)
    """the fleet's rig, as given to extract"""
    json: Path | None = None
    """also write the result for machines"""


def command(config: Ingest) -> None:
    """Take shards in. Safe to run again, and after a crash."""
    encoder = load_encoder(config.encoder / "encoder.safetensors" if config.encoder.is_dir() else config.encoder)
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


if __name__ == "__main__":
    sys.exit(run_command(command))

"""`upcycle3d ingest`: the server takes shards in after it has verified every byte. Read next: `perception/server/ingest.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from ..core.errors import InvalidInput, UpcycleError
from ..core.rig import RigSpec
from ..core.scan_options import ScanOptions
from ..perception.models.encoders.defended import defences_of
from ..perception.models.encoders.encoder import Encoder
from ..perception.models.encoders.fingerprint import encoder_fingerprint
from ..perception.recipes.audit_summary import AuditSummary, read_audit_summary, sentence
from ..perception.server.ingest import ingest
from ..perception.server.ingest_report import IngestReport, Refusal
from ..perception.server.store_note import NOTE, MeasuredUploads, StoreNote, read_store_note, write_store_note
from ..perception.wire.encoder_file import load_encoder
from .console import console, print_table, print_warning, run_command, write_json

_LISTED = 30
_EMPTY_WARNING = 0.1


@dataclass(frozen=True, kw_only=True)
class Ingest:
    """Verify uploaded shards and move them into a store. A shard that fails goes to STORE/quarantine with the reason."""

    incoming: tyro.conf.Positional[tuple[Path, ...]]
    """Folders with uploaded shards, one or several."""
    store: Path
    """Folder of the store."""
    detector: Path
    """Run folder of the detector whose encoder the fleet runs, or the encoder file alone. Features of another encoder stay where they
    are."""
    z_shift: float | None = None
    """The fleet's z shift, where `extract` got another one than the detector's training data."""
    intensity_scale: float | None = None
    """The fleet's intensity scale, where `extract` got another one than the detector's training data."""
    audit: Path | None = None
    """Folder of an audit of this encoder (`upcycle3d audit`). `inspect STORE` then says what was measured of such uploads. An audit that did
    not measure this encoder changes nothing."""
    final: bool = False
    """No upload is running any more: set incomplete shards aside instead of waiting for the rest."""
    retry_quarantine: bool = False
    """Also try the shards in the store's quarantine again. What fails again stays there."""
    rebuild_catalog: bool = False
    """Make the catalog again from the shards in the store, for example because it is damaged."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def command(config: Ingest) -> None:
    """Take shards in. It is safe to run this again, also after a crash."""
    encoder = load_encoder(config.detector)
    given = ScanOptions(z_shift=config.z_shift, intensity_scale=config.intensity_scale)
    rig = given.rig(None if encoder.trained_on is None else encoder.trained_on.rig)
    fingerprint = encoder_fingerprint(encoder, rig)
    audited = None if config.audit is None else read_audit_summary(config.audit)
    if not config.incoming:
        raise InvalidInput("no folder is given; name the folders that the vehicles upload to")
    missing = [folder for folder in config.incoming if not folder.is_dir()]
    if missing:
        raise InvalidInput(f"the incoming folder {missing[0]} does not exist; give the folder that the vehicles upload to")
    read_store_note(config.store)  # a damaged note ends the command before a shard moves
    reports = [
        ingest(
            folder,
            config.store,
            expected_fingerprint=fingerprint,
            expected_spec=encoder.upload_spec,
            final=config.final,
            retry_quarantine=config.retry_quarantine and number == 0,
            rebuild_catalog=config.rebuild_catalog and number == 0,
        )
        for number, folder in enumerate(dict.fromkeys(config.incoming))
    ]
    report = IngestReport.together(reports)
    _write_note(config, encoder, audited, report)
    write_json(config.json, ingest_json(report) | {"fingerprint": fingerprint, "rig": asdict(rig)})
    print_table("what became of the uploads", ("", "shards", "scenes"), _rows(report))
    _list("quarantined", report.quarantined)
    _list("waiting", report.waiting)
    if report.foreign:
        print_table(
            "of another encoder or rig, left where they are",
            ("fingerprint", "shards", "scenes"),
            [(f"{found.fingerprint[:16]}…", len(found.shards), found.scenes) for found in report.foreign],
        )
    if report.unrecognized:
        names = report.unrecognized
        print_warning(
            f"{len(names)} names in {_folders(config)} are not those of shards and were left alone: {', '.join(names[:5])}"
            f"{' …' if len(names) > 5 else ''}"
        )
    if report.nothing:
        print_warning(f"there is nothing to ingest: no shard lies in {_folders(config)}")
    if report.overdue:
        print_warning(f"{len(report.overdue)} shards have waited for more than a day for their other half; see the table")
    console.print(f"store: {config.store}", soft_wrap=True)
    _judge(config, report, rig, fingerprint)


def _write_note(config: Ingest, encoder: Encoder, audited: AuditSummary | None, report: IngestReport) -> None:
    """Write down which defences the uploads of the store passed, and what an audit measured of them."""
    defences, own = defences_of(encoder), encoder_fingerprint(encoder, RigSpec())
    earlier = read_store_note(config.store)
    measured = earlier.measured if earlier is not None and earlier.encoder == own else ()
    if config.audit is not None and audited is not None:
        found = tuple(
            MeasuredUploads(codec=row.codec, text=f"{sentence(row)} ({audited.strength})")
            for row in audited.settings
            if row.encoder == own
        )
        if not found:
            kept = f". What {config.store / NOTE} says of an earlier audit stays there" if measured else ""
            print_warning(
                f"no setting of the audit in {config.audit} has the encoder of {config.detector}; it measured {', '.join(row.name for row in audited.settings) or 'nothing'}. "
                f"The encoder of each setting is in its folder `detectors`; that one must go to the fleet{kept}"
            )
        measured = found or measured
    if not config.store.is_dir():
        return
    write_store_note(config.store, StoreNote(defences=defences, measured=measured, encoder=own))
    known = {found.codec for found in measured}
    if known and (missing := sorted({codec for codec, _ in report.codecs} - known)):
        print_warning(
            f"the store holds scenes in {', '.join(missing)}, and the audit measured uploads of this encoder in {', '.join(sorted(known))} only; "
            f"nothing is known of the others. Extract with --codec {min(known)}, or audit a setting with @{missing[0]}"
        )


def _judge(config: Ingest, report: IngestReport, rig: RigSpec, fingerprint: str) -> None:
    """Warn of what is odd, and end with an error where nothing was taken in."""
    foreign = sum(len(found.shards) for found in report.foreign)
    if report.refused_all and foreign:
        others = ", ".join(f"{found.fingerprint[:12]}…" for found in report.foreign)
        raise UpcycleError(
            f"no shard was accepted: {_foreign_shards(foreign)} ({others}) than {fingerprint[:12]}… of {config.detector} with "
            f"{rig}, and {'stays' if foreign == 1 else 'stay'} in {_folders(config)}. Give the same --detector (its defences count, too), --z-shift and --intensity-scale as in `extract`; while a new "
            "encoder is rolled out, ingest into one store per encoder (docs/rollout.md)"
        )
    if report.refused_all:
        raise UpcycleError(
            f"no shard was accepted; the {len(report.quarantined)} refused ones are in {config.store}/quarantine with the reasons. Once the "
            "cause is gone, --retry-quarantine tries them again"
        )
    if foreign:
        print_warning(
            f"{_foreign_shards(foreign)}, and {'stays' if foreign == 1 else 'stay'} in {_folders(config)}; ingest such shards into the store of that encoder with its "
            "--detector and rig (docs/rollout.md)"
        )
    if report.new_scenes and report.empty_scenes == report.new_scenes:
        raise UpcycleError(
            f"none of the {report.new_scenes} new scenes has a cell, so nothing can be learned from them: the scans had no point in the "
            "detector's range. Look at the rig and the crop of `extract`, delete these shards from the store and extract again"
        )
    if report.accepted and len(report.codecs) > 1:
        print_warning(
            f"the store holds scenes of several codecs ({', '.join(f'{codec} {count}' for codec, count in report.codecs)}). A training uses "
            "all of them, and gives its labeled features the rounding of one (`upcycle --codec`); extract with one --codec"
        )
    if report.repeated_scenes:
        print_warning(
            f"{report.repeated_scenes} of {report.new_scenes} new scenes have the same content as another scene of the store; scans that "
            "were extracted twice count twice in training. The table names the shards; delete the files of a new shard (.tar and .json) in "
            f"{config.store}/shards where all of its scenes are repeated, and run ingest again"
        )
        _list_repeated(report)
    if report.empty_scenes > _EMPTY_WARNING * report.new_scenes:
        print_warning(
            f"{report.empty_scenes} of {report.new_scenes} new scenes have no cell; look at the rig and the crop of `extract`"
        )


def _folders(config: Ingest) -> str:
    return ", ".join(map(str, config.incoming))


def _foreign_shards(count: int) -> str:
    return "1 shard is of another encoder or rig" if count == 1 else f"{count} shards are of another encoder or rig"


def _list_repeated(report: IngestReport) -> None:
    rows = [
        (r.shard, r.scenes, r.repeated, ", ".join(r.others[:3]) + (" …" if len(r.others) > 3 else "") or "itself")
        for r in report.repeated_shards[:_LISTED]
    ]
    more = len(report.repeated_shards) - len(rows)
    more_row = [("…", "", "", f"and {more} more; --json FILE lists all")] if more else []
    print_table("new shards with repeated scenes", ("shard", "scenes", "repeated", "the same content is in"), [*rows, *more_row])


def _rows(report: IngestReport) -> list[tuple[str, int, int | str]]:
    duplicates = len(report.duplicates)
    rows: list[tuple[str, int, int | str]] = [
        ("accepted", len(report.accepted), report.new_scenes),
        ("already there", len(report.already_there), ""),
        ("quarantined: scenes that are there already", duplicates, ""),
        ("quarantined: other reasons", len(report.quarantined) - duplicates, ""),
        ("of another encoder or rig", sum(len(f.shards) for f in report.foreign), sum(f.scenes for f in report.foreign)),
        ("waiting", len(report.waiting), ""),
        ("deleted from the store since", len(report.gone), ""),
        ("names that are no shard", len(report.unrecognized), ""),
    ]
    return [row for row in rows if row[1] or row[0] == "accepted"] + [
        ("in the store now", report.total_shards, report.total_scenes)
    ]


def _list(title: str, refusals: Sequence[Refusal]) -> None:
    if refusals:
        rows = [(r.shard[:16], r.reason) for r in refusals[:_LISTED]]
        more = len(refusals) - len(rows)
        print_table(title, ("shard", "why"), [*rows, *([("…", f"and {more} more; --json FILE lists all")] if more else [])])


def ingest_json(report: IngestReport) -> dict[str, object]:
    """The report as JSON values, with the numbers of shards and scenes by outcome.

    Args:
        report: What `ingest` returned.

    Returns:
        All its fields, and `counts`.
    """
    duplicates = len(report.duplicates)
    counts = {
        "shards_accepted": len(report.accepted),
        "shards_already_there": len(report.already_there),
        "shards_duplicate": duplicates,
        "shards_refused": len(report.quarantined) - duplicates,
        "shards_foreign": sum(len(f.shards) for f in report.foreign),
        "shards_waiting": len(report.waiting),
        "shards_overdue": len(report.overdue),
        "names_unrecognized": len(report.unrecognized),
        "scenes_accepted": report.new_scenes,
        "scenes_empty": report.empty_scenes,
        "scenes_repeated": report.repeated_scenes,
        "scenes_foreign": sum(f.scenes for f in report.foreign),
        "scenes_in_store": report.total_scenes,
    }
    return {**asdict(report), "counts": counts}


if __name__ == "__main__":
    sys.exit(run_command(command))

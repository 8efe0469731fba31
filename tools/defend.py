"""`upcycle3d defend`: limit what the encoder of a detector lets out. Read next: `perception/recipes/defend.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..perception.models.defences.region import RegionConfig
from ..perception.models.defences.table import describe_defences, parse_defences
from ..perception.privacy.obfuscator_training import ObfuscatorTraining
from ..perception.recipes.defend import defend_detector
from .console import console, print_table, run_command
from .data_option import DataOption


@dataclass(frozen=True, kw_only=True)
class Defend:
    """Give a trained detector defences, which its encoder file then takes to the fleet."""

    detector: Path
    """Run folder or file of a detector without defences."""
    data: DataOption
    """Labeled split of a prepared dataset that the defences are fitted to, `train` where no split is named."""
    out: Path
    """Run folder to write."""
    defences: tuple[str, ...]
    """Defences in order, the first one next to the encoder: a name, and settings after a colon, as in `region:margin_cells=2 noise:sigma=0.1`.
    One word with `+` in place of the spaces is the same; the command prints the defences in that form. The names are region, drop, jitter, decoy, noise, rounding, bottleneck and obfuscator; a wrong setting is answered with the settings that
    the defence has. docs/privacy.md says what each does and what was measured."""
    steps: int = 400
    """Optimizer steps of the head of a region upload."""
    obfuscator: ObfuscatorTraining = ObfuscatorTraining()
    """How a learned obfuscator is trained."""
    seed: int = 0
    """Decides every random draw."""


def command(config: Defend) -> None:
    """Give a trained detector defences."""
    defences = [defence for text in config.defences for defence in parse_defences(text)]
    outcome = defend_detector(
        config.detector, config.data, config.out, defences, steps=config.steps, training=config.obfuscator, seed=config.seed
    )
    rows: list[tuple[object, ...]] = [
        ("defences", describe_defences(defences)),
        ("labeled frames", outcome.frames),
        ("cells of a scene", f"{outcome.cells:,.0f}"),
        ("cells that are sent", f"{outcome.cells_sent:,.0f} ({outcome.cells_sent / max(outcome.cells, 1):.0%})"),
    ]
    if (found := outcome.fitted.objectness) is not None:
        asked = next(f"{d.recall:.1%}" for d in reversed(defences) if isinstance(d, RegionConfig))
        kept = f"{found.objects_kept} of {found.objects} ({found.objects_kept / max(found.objects, 1):.1%})"
        rows += [
            ("held-out objects of which at least one cell is sent", f"{kept}; `recall` asked for {asked}"),
            ("share of all cells inside these objects that is sent", f"{found.object_cells_kept:.1%}"),
            ("share of all cells that lie near possible objects", f"{found.cells_kept:.1%}"),
        ]
    if (learned := outcome.fitted.obfuscator) is not None:
        rows.append(
            (
                "adversary of the obfuscator",
                f"{learned.adversary_bits:.1f} bits per cell; without features {learned.blind_bits:.1f}",
            )
        )
    print_table("defended", ("what", "value"), rows)
    console.print(
        f"detector and encoder: {config.out}; give its encoder.safetensors to the fleet, and --detector {config.out} to extract, "
        f"ingest and upcycle. What is sent can still be turned back in part. To measure how much, run `upcycle3d audit --detector {config.detector} "
        f"--settings defended={describe_defences(defences)}` with --attacker, --victims and --out: its folder `detectors` then holds a detector for "
        "each setting, and the numbers are about that one",
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(run_command(command))

"""What `upcycle3d moe bam` and `moe baseline` have in common: plan, specialists, joint training, tables and files of one result.

Read next: `language_options.py`, which checks the options before this begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core.new_folder import require_empty
from ..core.short_numbers import score_text
from ..perception.moe.attention.model_cost import model_cost
from ..perception.moe.checkpoints.mixtral import MixtralLayout
from ..perception.moe.language.language_models import LanguageModel, load_language_model
from ..perception.moe.language.language_plans import LanguagePlan, ModelFormat, cost_text
from ..perception.moe.language.language_upcycling import expert_names, write_model
from ..perception.moe.language.phases import scored_part
from ..perception.moe.language.specialists import Specialist, folder_names, require_fitting, specialist_names
from ..perception.moe.language.text_scores import perplexity, score_texts, text_rows
from ..perception.moe.language.text_training import TokenDomains
from ..perception.moe.report import MoeReport, report_on
from ..perception.moe.upcycling.upcyclers import Upcycled
from .console import console, print_warning, write_json
from .language_options import LanguageOptions, Texts, working_folder
from .language_tables import finite, print_perplexities, print_specialists, print_use, seconds_line


@dataclass(frozen=True, kw_only=True)
class LanguageJob:
    """One result to make."""

    method: str
    """`bam` or the name of a baseline."""
    mixes: bool
    """Whether it is made of specialists."""
    trains: bool
    """Whether the result is trained on all texts."""
    owners: bool = False
    """Whether owners are trained on the texts."""
    seed_model: Path
    """Folder of the dense model."""
    out: Path
    """Folder of the job."""
    options: LanguageOptions
    """Texts, specialists and training."""
    plan: Callable[[nn.Module, int], LanguagePlan]
    """Plans what is replaced, for the seed and a number of specialists and owners."""
    make: Callable[[LanguageModel, Sequence[nn.Module], TokenDomains | None], Upcycled]
    """Makes the result of the seed, the specialists and the texts."""
    form: ModelFormat
    """Form of the result."""
    layout: MixtralLayout = "per_expert"
    """Names of a Mixtral's experts."""
    settings: Mapping[str, Any]
    """The options as JSON values."""
    json: Path | None = None
    """Where the numbers go."""


def run_job(job: LanguageJob, files: Mapping[str, Path]) -> None:
    """Make, train, score and write one result.

    Args:
        job: What to make; its options are checked.
        files: File of each text.
    """
    options = job.options
    if not options.plan_only:
        require_empty(job.out / "model")
    source = load_language_model(job.seed_model)
    names = folder_names(options.specialists) if options.specialists else specialist_names(files, options.general)
    plan = job.plan(source.model, len(names) if job.mixes else len(files))
    console.print(str(plan))
    if options.plan_only:
        console.print("--plan-only: nothing was trained or written")
        return
    texts = options.read_texts(source, files, learns=job.owners or (job.mixes and not options.specialists), joint=job.trains)
    for name, tokens in texts.tests.items():
        rows = text_rows(source.model, tokens)
        console.print(f"{name}: scores are of {scored_part(tokens, texts.whole[name], rows)} tokens, which are never trained on")
    given = options.given_specialists()
    require_fitting(source, given)
    with working_folder(job.out):
        _run(job, source, texts, given)


def _run(job: LanguageJob, source: LanguageModel, texts: Texts, given: list[Specialist]) -> None:
    options = job.options
    specialists: list[Specialist] = []
    if job.mixes:
        specialists = given or options.trained_specialists(source, texts.train, job.out / "specialists")
    names = [one.name for one in specialists]
    experts = expert_names(job.method, names, list(texts.tests))
    start = time.process_time()
    made = job.make(source, [one.model for one in specialists], texts.train)
    making = time.process_time() - start
    console.print(f"made: {_title(job.method, len(names))}; {made.account}", soft_wrap=True)
    fresh = _report(made, texts, experts, source)
    dense = {s.domain: s.dense for s in fresh.scores if s.dense is not None} if fresh else {}
    each = {one.name: {name: perplexity(one.model, tokens) for name, tokens in texts.tests.items()} for one in specialists}
    unfinished = job.out / "mix.unfinished.safetensors"
    record = options.train_result(made.model, texts.train, unfinished) if job.trains else None
    done = None if record is None else _report(made, texts, experts)
    before, after = (None if report is None else {s.domain: s.score for s in report.scores} for report in (fresh, done))
    steps = 0 if record is None else len(record.losses)
    scored = ", ".join(f"{name} {score_text(value)}" for name, value in (after or before or {}).items())
    note = f"{_title(job.method, len(names))}, {steps} steps together; perplexity: {scored or 'not measured'}"
    said = write_model(job.out / "model", made, source, job.form, layout=job.layout, note=note, experts=experts)
    unfinished.unlink(missing_ok=True)
    if dense and before is not None:
        if each:
            print_specialists(dense, each)
        print_perplexities(dense, before, after, _title(job.method, len(names)))
    if (last := done or fresh) is not None:
        print_use(last)
    costs = model_cost(source.model), model_cost(made.model)
    console.print(cost_text(*costs), soft_wrap=True)
    seconds = {one.name: one.cpu_seconds for one in specialists}
    console.print(seconds_line(seconds, making, None if record is None else record.cpu_seconds), soft_wrap=True)
    console.print(said, soft_wrap=True)
    scores = {"dense": dense, "before": before, "after": after, "specialists": each}
    write_json(
        job.json,
        {
            "method": job.method,
            "settings": job.settings,
            "experts": list(experts),
            "steps": {"specialists": options.specialist_steps if seconds and not given else None, "result": steps},
            "cpu_seconds": {"specialists": seconds, "making": making, "result": None if record is None else record.cpu_seconds},
            "cost": {"dense": asdict(costs[0]), "result": asdict(costs[1])},
            "perplexity": finite(scores),
        },
    )


def _report(made: Upcycled, texts: Texts, experts: Sequence[str], source: LanguageModel | None = None) -> MoeReport | None:
    """Score the result and count the use of its experts; with the seed beside it, also warn of a bad start."""
    if not texts.tests:
        return None
    report = report_on(made.model, score_texts(texts.tests), dense=None if source is None else source.model, experts=experts)
    for warning in report.warnings:
        print_warning(warning if source is None else f"before training: {warning}")
    return report


def _title(method: str, specialists: int) -> str:
    models = f" of the seed and {specialists} {'specialist' if specialists == 1 else 'specialists'}" if specialists else ""
    return f"{'BAM' if method == 'bam' else method}{models}"

"""The training loop: a pure sequence of steps, shared by supervised training and UpCycling.

What step `s` does depends only on (seed, s, weights): its batch is `batches(s)`, dropout is seeded from (seed, s), the learning
rate is a function of s. So resuming is loading the weights and the optimizer and going on at s, bit for bit on the CPU (with the
same number of threads: torch sums in another order with another number), and there is no epoch, sampler or scheduler state to
keep.

    batches(s) -> optimizer step -> after_step(s) (EMA teacher)     then, counted in steps done: metrics, checkpoint

Read next: `step.py` for what one step does, and `run_folder.py` for what is kept.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ...core.errors import Interrupted, InvalidInput, NonFiniteValue, UpcycleError
from ...core.structures import LossTerms
from ..models.non_finite import first_broken_weight
from .checkpoint import checkpoint_path, latest_checkpoint, load_checkpoint, save_checkpoint
from .distributed import DistributedContext
from .optim import OneCycle, learning_rate
from .prefetch import prefetch
from .progress import StopRequest, TrainingProgress
from .run_folder import RunFolder, State
from .step import Batch, OptimizerStep
from .trackers import TrackerName


class NonFiniteLoss(UpcycleError):
    """A loss term, the gradient, a weight or the output of a layer is NaN or infinite. The message names it, the step and the frames of
    each rank where it was, and says which weights are kept."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What decides the result of a run, apart from data and model. The number of steps is `optim.total_steps`."""

    seed: int
    """Seed of dropout and of everything else that is drawn during a step."""

    optim: OneCycle
    """Learning rate, number of steps and weight decay."""

    clip_norm: float = 10.0
    """Largest L2 norm of the gradient over all parameters; a larger gradient is scaled down to it. inf switches clipping off."""

    log_every: int = 50
    """Steps between two lines of metrics."""

    checkpoint_every: int = 1000
    """Steps between two checkpoints; one more is written at the end. Lower it where a run is often killed."""

    keep_checkpoints: int = 2
    """Number of newest checkpoints that are kept. With one, a checkpoint damaged on the disk costs the whole run."""

    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision of the forward pass, on CUDA only; losses stay float32. bf16 needs no loss scale, so prefer it where the
    GPU has it."""

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"LoopConfig.{name} must be at least 1, found {getattr(self, name)}")
        if not self.clip_norm > 0:
            raise InvalidInput(f"LoopConfig.clip_norm must be positive (inf: no clipping), found {self.clip_norm}")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.optim.total_steps


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run reports."""

    steps: int
    """Optimizer steps of the whole run."""

    start_step: int
    """Steps that were done before this call; above 0 if the run was resumed."""

    seconds: float
    """Duration of this call."""

    terms: Mapping[str, float] = field(default_factory=dict)
    """Loss terms of the last step; empty if the run was finished before."""


def create_run(
    path: str | Path,
    config: object,
    *,
    seed: int,
    context: DistributedContext,
    resume: bool = False,
    may_differ: Sequence[str] = (),
    tracker: TrackerName = "tensorboard",
) -> RunFolder:
    """Create or resume a run folder with several processes: the main rank writes it, the others read it.

    Args:
        path: The run folder.
        config: The resolved configuration, a frozen dataclass.
        seed: Seed of the run, for the record.
        context: This process among the others.
        resume: Whether a run of the same configuration in `path` is continued.
        may_differ: Fields that a resumed run may change; see `RunFolder.create`.
        tracker: Where metrics are also shown.

    Returns:
        The folder, writable on the main rank only.

    Raises:
        InvalidInput: `RunFolder.create` failed on the main rank; the error is raised on all ranks.
    """
    run, failure = None, ""
    if context.is_main:
        try:
            run = RunFolder.create(path, config, seed=seed, resume=resume, may_differ=may_differ, tracker=tracker)
        except UpcycleError as error:
            failure = str(error)
    failure = context.gather(failure)[0]
    if failure:
        raise InvalidInput(failure)
    return run or RunFolder.open(path)


def run_steps(
    *,
    modules: Mapping[str, nn.Module],
    trainable: Iterable[nn.Parameter],
    batches: Callable[[int], Batch],
    loss: Callable[[Batch, int], LossTerms],
    config: LoopConfig,
    run: RunFolder | None = None,
    after_step: Callable[[int], Mapping[str, float] | None] | None = None,
    frame_ids: Callable[[Batch], Sequence[str]] | None = None,
    workers: int = 0,
    context: DistributedContext | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train for `config.total_steps` steps, going on from the newest checkpoint of the run if there is one.

    Args:
        modules: What a checkpoint keeps, e.g. student and teacher; they hold every trainable parameter. Their train or eval
            modes are the caller's choice.
        trainable: The parameters to train.
        batches: `batches(step)` gives the batch of a 0-based step, of this rank. It must be a pure function, with generators of
            its own that are seeded from the step.
        loss: `loss(batch, step)` gives the weighted float32 terms of this rank. It runs under autocast if `config.amp` says so:
            cast outputs to float32 before computing terms.
        config: Seed, schedule, clipping, and how often to log and save.
        run: Where metrics and checkpoints go. None keeps nothing.
        after_step: `after_step(step)` is called after the optimizer step, e.g. for `update_ema`; the values that it returns are
            logged with the losses of the step.
        frame_ids: `frame_ids(batch)` names the frames of a batch, for messages.
        workers: Processes that make batches ahead; the result does not depend on their number.
        context: This process among the others; None for a single process.
        progress: Whether progress is printed.

    Returns:
        Steps, duration and the last losses.

    Raises:
        NonFiniteLoss: A loss or gradient is not finite; the last good weights are saved.
        Interrupted: Ctrl-C or SIGTERM; the last step is saved. A second one aborts at once; with a run folder, that is `Interrupted` too.
        CorruptCheckpoint: The newest checkpoint is damaged.
        UpcycleError: The disk is full, or a process that makes batches died.
        InvalidInput: Modules, parameters or loss terms do not fit together.
    """
    context = context or DistributedContext()
    parameters = list(trainable)
    one_step = OptimizerStep(
        modules,
        parameters,
        loss,
        optim=config.optim,
        seed=config.seed,
        clip_norm=config.clip_norm,
        amp=config.amp,
        context=context,
        frame_ids=frame_ids,
    )
    keeper = _Keeper(run, modules, one_step, config)
    began, total = time.perf_counter(), config.total_steps
    finished_before = run is not None and run.status().get("state") == "finished"
    start = keeper.resume(context)
    if finished_before and start == total:
        return TrainResult(steps=start, start_step=start, seconds=0.0)
    keeper.rewind(start)
    terms: dict[str, float] = {}
    with ExitStack() as stack:
        stack.enter_context(keeper.reporting_failure())
        stop = stack.enter_context(StopRequest())
        show = stack.enter_context(TrainingProgress(start, total, enabled=progress and context.is_main))
        if config.amp != "off" and one_step.device.type != "cuda":
            show.note(f"mixed precision ({config.amp}) is for CUDA; training on the {one_step.device} in float32")
        keeper.set_status("running", start)
        source = stack.enter_context(closing(prefetch(batches, start, total, workers)))
        clock = _Clock(start)
        for step in range(start, total):
            try:
                batch = clock.wait_for_next(source)
            except NonFiniteValue as error:  # self-training labels its scans when it makes a batch
                raise NonFiniteLoss(keeper.save_failed(step, f"training stopped before step {step}: {error}.")) from error
            outcome = one_step.run(batch, step, stop)
            if outcome.fault:
                raise NonFiniteLoss(keeper.save_failed(step, outcome.fault))
            extra = after_step(step) if after_step is not None else None
            done = step + 1
            last = done == total
            show.advance()
            if done % config.log_every == 0 or last:
                terms = outcome.terms.floats()
                values = {
                    "total_loss": sum(terms.values()),
                    "grad_norm": outcome.grad_norm.item(),
                    "lr": learning_rate(config.optim, step),
                    **clock.lap(done),
                }
                values = _disjoint(terms, values, extra or {})
                show.report(done, values)
                keeper.log(done, values)
            saving = last or outcome.stopping or done % config.checkpoint_every == 0
            if saving and (broken := first_broken_weight(modules)):
                fault = f"training stopped after step {step} (0-based): the weight {broken} holds NaN or infinite values."
                raise NonFiniteLoss(keeper.save_failed(done, fault))
            if outcome.stopping and not last:
                keeper.save(done, "interrupted")
                raise Interrupted(_how_to_resume(done, total, run, context), by=stop.signal or signal.SIGINT)
            if last or done % config.checkpoint_every == 0:
                keeper.save(done, "running")
        keeper.finish()
    return TrainResult(steps=total, start_step=start, seconds=time.perf_counter() - began, terms=terms)


class _Keeper:
    """What a run folder keeps of the loop. Where there is none, or this rank may not write to it, nothing is written."""

    def __init__(
        self, run: RunFolder | None, modules: Mapping[str, nn.Module], step: OptimizerStep[Any], config: LoopConfig
    ) -> None:
        self._run, self._modules, self._step, self._config = run, modules, step, config
        self._writer = run if run is not None and run.writable else None

    def resume(self, context: DistributedContext) -> int:
        """Load the newest checkpoint, if there is one; returns the number of steps done."""
        path = None if self._run is None else latest_checkpoint(self._run.checkpoints)
        done = 0
        if path is not None:
            done, meta = load_checkpoint(path, self._modules, self._step.optimizer)
            if self._step.scaler.is_enabled():
                self._step.scaler.load_state_dict(meta["scaler"])
        context.any([False])  # every rank has read the checkpoint before the main rank goes on to write
        return done

    def rewind(self, step: int) -> None:
        if self._writer is not None:
            self._writer.rewind(step)

    def log(self, done: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            self._writer.log(done, values)

    def set_status(self, state: State, step: int, message: str = "") -> None:
        if self._writer is not None:
            self._writer.set_status(state, step=step, total_steps=self._config.total_steps, message=message)

    def save(self, step: int, state: State, message: str = "", *, keep_more: int = 0) -> None:
        """Write a checkpoint after `step` steps, unless it is there, and then the status.

        `keep_more` older checkpoints are kept: weights that fail at the next step may have been wrong for a while.
        """
        writer = self._writer
        if writer is None:
            return
        writer.sync()
        meta = {"config": writer.config_json(), "scaler": self._step.scaler.state_dict()}
        # A step that fails right after its checkpoint finds it there, with the same content.
        if latest_checkpoint(writer.checkpoints) != checkpoint_path(writer.checkpoints, step):
            save_checkpoint(
                writer.checkpoints,
                step=step,
                modules=self._modules,
                optimizer=self._step.optimizer,
                meta=meta,
                keep_last=self._config.keep_checkpoints + keep_more,
            )
        self.set_status(state, step, message)

    def save_failed(self, step: int, fault: str) -> str:
        """Keep the weights after `step` good steps, if they are good, and the older checkpoints in any case; returns the message."""
        good = not first_broken_weight(self._modules)
        if good:
            self.save(step, "failed", fault, keep_more=1)
        newest = None if self._run is None else latest_checkpoint(self._run.checkpoints)
        if good:
            kept = f"The weights after {step} good steps are kept."
        elif newest is not None:
            kept = f"The weights are broken, so they are not kept; the last good ones are in {newest}."
        else:
            kept = "The weights are broken, and there is no earlier checkpoint."
        init = "" if newest is None else f", starting from a checkpoint of before (--init {newest})"
        message = (
            f"{fault} {kept} Look at these frames, or train in a new folder with a lower learning rate{init}; resuming with the same "
            "configuration stops at the same step"
        )
        self.set_status("failed", step, message)
        return message

    def finish(self) -> None:
        self.set_status("finished", self._config.total_steps)
        if self._writer is not None:
            self._writer.sync()

    def reporting_failure(self) -> AbstractContextManager[None]:
        return nullcontext() if self._writer is None else self._writer.reporting_failure(self._config.total_steps)


class _Clock:
    """Seconds per step since the last line of metrics, and how many of them were spent waiting for batches."""

    def __init__(self, start: int) -> None:
        self._done, self._time, self._waited = start, time.perf_counter(), 0.0

    def wait_for_next(self, source: Generator[Batch, None, None]) -> Batch:
        asked = time.perf_counter()
        batch = next(source)
        self._waited += time.perf_counter() - asked
        return batch

    def lap(self, done: int) -> dict[str, float]:
        now, steps = time.perf_counter(), done - self._done
        values = {"seconds": (now - self._time) / steps, "data_seconds": self._waited / steps}
        self._done, self._time, self._waited = done, now, 0.0
        return values


def _how_to_resume(done: int, total: int, run: RunFolder | None, context: DistributedContext) -> str:
    under = f" (under torchrun, {context.world_size} processes)" if context.world_size > 1 else ""  # which a rank cannot see
    how = f"resume with{under}: {run.resume_command}" if run is not None else "it had no run folder, so nothing was saved"
    return f"training was interrupted after {done} of {total} steps; {how}"


def _disjoint(*parts: Mapping[str, float]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for part in parts:
        clash = merged.keys() & part.keys()
        if clash:
            raise InvalidInput(
                f"two metrics of a step share a name: {sorted(clash)}; rename the loss term or what after_step returns"
            )
        merged.update(part)
    return merged

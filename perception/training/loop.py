"""The training loop: a pure sequence of steps, shared by supervised training and UpCycling.

What step ``s`` does depends only on (seed, s, weights): its batch is ``batches(s)``, dropout is seeded from (seed, s), the
learning rate is a function of s. So resuming is loading the weights and the optimiser and going on at s, bit for bit on the CPU
(with the same number of threads: torch sums in another order with another number), and there is no epoch, sampler or scheduler
state to keep.

    seed(s) -> batches(s) -> loss -> backward -> mean over ranks -> finite? -> clip -> AdamW -> after_step(s) (EMA teacher)
               then, counted in steps done: metrics, checkpoint
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from ...core.errors import InvalidInput, UpcycleError
from ...core.structures import LossTerms
from .checkpoint import checkpoint_path, latest_checkpoint, load_checkpoint, save_checkpoint
from .distributed import DistributedContext, all_reduce_gradients, average_statistics, training_buffers
from .optim import OneCycle, learning_rate, make_optimizer, set_schedule
from .prefetch import prefetch
from .progress import Progress, StopRequest
from .run_folder import RunFolder, State

Batch = TypeVar("Batch")


class NonFiniteLoss(UpcycleError):
    """A loss term or the gradient is NaN or infinite; the message names it, the step and the frames of each rank where it was."""


class Interrupted(UpcycleError):
    """Training was stopped by Ctrl-C (or SIGTERM) after a complete step, which is saved; the message says how to resume."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What decides the result of a run, apart from data and model. The number of steps is ``optim.total_steps``."""

    seed: int
    optim: OneCycle
    clip_norm: float = 10.0  # gradients are scaled down to this L2 norm over all parameters
    log_every: int = 50  # steps
    checkpoint_every: int = 1000  # steps; one more is written at the end
    keep_checkpoints: int = 2
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision of the forward pass, on CUDA only; losses stay float32

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"LoopConfig.{name} must be at least 1, found {getattr(self, name)}")
        if not self.clip_norm > 0:
            raise InvalidInput(f"LoopConfig.clip_norm must be positive (inf: no clipping), found {self.clip_norm}")

    @property
    def total_steps(self) -> int:
        return self.optim.total_steps


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run reports. ``start_step`` > 0 if it was resumed; ``terms`` are the losses of the last step made here."""

    steps: int
    start_step: int
    seconds: float
    terms: Mapping[str, float] = field(default_factory=dict)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A 63-bit seed for one step of one rank: well mixed, so that neighbouring steps and seeds share nothing."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def create_run(path: Path, config: object, *, seed: int, context: DistributedContext, resume: bool = False) -> RunFolder:
    """``RunFolder.create`` on the main rank, ``RunFolder.open`` on the others; an error on the main rank is raised on all."""
    run, failure = None, ""
    if context.is_main:
        try:
            run = RunFolder.create(path, config, seed=seed, resume=resume)
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
    """Train ``trainable`` for ``config.total_steps`` steps, going on from the newest checkpoint of ``run`` if there is one.

    modules: what a checkpoint keeps, e.g. student and teacher; they hold every trainable parameter. Their train/eval modes are
        the caller's choice.
    batches(step): the batch of a 0-based step, of this rank; a pure function (its own generator seeded from the step).
    loss(batch, step): weighted float32 terms of this rank. Runs under autocast if ``config.amp`` says so: cast outputs to
        float32 before computing terms.
    after_step(step): after the optimiser step, e.g. ``update_ema``; what it returns is logged with the step's losses.
    frame_ids(batch): for messages. workers: processes that make batches ahead; the result does not depend on it.
    progress: False prints nothing.

    Raises NonFiniteLoss (the last good weights are saved), Interrupted (Ctrl-C or SIGTERM; saved; a second one aborts at once),
    CorruptCheckpoint, and InvalidInput where modules, parameters or loss terms do not fit together.
    """
    context = context or DistributedContext()
    parameters = list(trainable)
    optimizer = make_optimizer(parameters, config.optim)
    names = _names(modules, parameters)
    scaler = torch.amp.GradScaler("cuda", enabled=config.amp == "fp16" and parameters[0].device.type == "cuda")
    writer = run if run is not None and run.writable else None

    def save(step: int, state: State, message: str = "") -> None:
        if writer is not None:
            writer.sync()
            meta = {"config": writer.config_json(), "scaler": scaler.state_dict()}
            newest, keep = latest_checkpoint(writer.checkpoints), config.keep_checkpoints
            if newest != checkpoint_path(writer.checkpoints, step):  # it is where the next step fails: same content
                save_checkpoint(writer.checkpoints, step=step, modules=modules, optimizer=optimizer, meta=meta, keep_last=keep)
            writer.set_status(state, step=step, total_steps=config.total_steps, message=message)

    began = time.perf_counter()
    complete = run is not None and run.status().get("state") == "finished"
    start = _resume(run, modules, optimizer, scaler, context)
    if complete and start == config.total_steps:
        return TrainResult(steps=start, start_step=start, seconds=0.0)
    if writer is not None:
        writer.rewind(start)

    terms: dict[str, float] = {}
    with ExitStack() as stack:
        stack.enter_context(_status_of_failure(writer, config))
        stop = stack.enter_context(StopRequest())
        show = stack.enter_context(Progress(start, config.total_steps, enabled=progress and context.is_main))
        if config.amp != "off" and parameters[0].device.type != "cuda":
            show.note(f"mixed precision ({config.amp}) is for CUDA; training on the {parameters[0].device} in float32")
        if writer is not None:
            writer.set_status("running", step=start, total_steps=config.total_steps)
        source = stack.enter_context(closing(prefetch(batches, start, config.total_steps, workers)))
        logged_at, logged_time, waited = start, time.perf_counter(), 0.0
        for step in range(start, config.total_steps):
            asked = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - asked

            before = _Snapshot(modules.values())
            losses, norm, norms = _forward_backward(batch, step, loss, config, optimizer, scaler, parameters, context)
            bad_loss, bad_gradient = _non_finite(losses, norm, norms, names, scaler)
            any_bad_loss, any_bad_gradient, stopping = context.any([bool(bad_loss), bool(bad_gradient), stop.requested])
            if any_bad_loss or any_bad_gradient:
                before.restore()
                fault = bad_loss if any_bad_loss else bad_gradient  # a bad loss on one rank spoils the gradients of all
                ids = tuple(frame_ids(batch)) if frame_ids is not None and fault else ()
                message = _explain(fault, step, ids, config, context)
                save(step, "failed", message)
                raise NonFiniteLoss(message)
            _clip(parameters, norm, config.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            average_statistics(modules.values(), context)
            extra = after_step(step) if after_step is not None else None

            done = step + 1
            last = done == config.total_steps
            show.advance()
            if done % config.log_every == 0 or last:
                terms = losses.floats()
                now, steps = time.perf_counter(), done - logged_at
                values = {
                    "total_loss": sum(terms.values()),
                    "grad_norm": norm.item(),
                    "lr": learning_rate(config.optim, step),
                    "seconds": (now - logged_time) / steps,  # per step, all included
                    "data_seconds": waited / steps,  # of these, waiting for the batch
                }
                logged_at, logged_time, waited = done, now, 0.0
                values = _disjoint(terms, values, extra or {})
                show.report(done, values)
                if writer is not None:
                    writer.log(done, values)
            if stopping and not last:
                save(done, "interrupted")
                raise Interrupted(_how_to_resume(done, config, run, context))
            if last or done % config.checkpoint_every == 0:
                save(done, "running")
        if writer is not None:
            writer.set_status("finished", step=config.total_steps, total_steps=config.total_steps)
            writer.sync()
    return TrainResult(steps=config.total_steps, start_step=start, seconds=time.perf_counter() - began, terms=terms)


def _forward_backward(
    batch: Batch,
    step: int,
    loss: Callable[[Batch, int], LossTerms],
    config: LoopConfig,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Sequence[nn.Parameter],
    context: DistributedContext,
) -> tuple[LossTerms, Tensor, list[Tensor]]:
    """Fill the gradients of one step. Returns the loss terms, the gradient's L2 norm, and the norm of each parameter's."""
    torch.manual_seed(step_seed(config.seed, step, context.rank))
    set_schedule(optimizer, config.optim, step)
    optimizer.zero_grad(set_to_none=True)
    with _autocast(config.amp, parameters[0].device):
        terms = loss(batch, step)
    if not terms.terms:
        raise InvalidInput(f"the loss of step {step} has no term; a step without anything to learn should return a zero term")
    for name, value in terms.terms.items():
        if value.ndim or value.dtype not in (torch.float32, torch.float64):
            raise InvalidInput(
                f"the loss term {name!r} must be a float32 scalar, found {tuple(value.shape)} {value.dtype}; "
                "cast the network's outputs with .float() before the losses"
            )
    total = terms.total()
    if not total.requires_grad:
        raise InvalidInput(
            f"no loss term of step {step} depends on a trainable parameter: {sorted(terms.terms)}; is the network frozen?"
        )
    scaler.scale(total).backward()  # type: ignore[no-untyped-call]
    all_reduce_gradients(parameters, context)  # before unscaling: an overflow on one rank must reach all
    scaler.unscale_(optimizer)
    norms = torch._foreach_norm([p.grad if p.grad is not None else p.new_zeros(()) for p in parameters])
    return terms, torch.stack(list(norms)).norm(), list(norms)


def _clip(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients so that their common L2 norm is at most ``limit``."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))


def _non_finite(
    losses: LossTerms, norm: Tensor, norms: Sequence[Tensor], names: Sequence[str], scaler: torch.amp.GradScaler
) -> tuple[str, str]:
    """Which loss term, and which parameter's gradient, is not finite; "" where all is well. One transfer from the device."""
    total, gradient = torch.stack([losses.total().detach().to(norm.dtype), norm]).isfinite().tolist()
    bad_loss = bad_gradient = ""
    if not total:
        bad_loss = losses.first_non_finite() or "the sum of all terms"
    scale_can_shrink = scaler.is_enabled() and scaler.get_scale() > 1.0  # then GradScaler skips this step and shrinks it
    if not gradient and not scale_can_shrink:
        first = next((name for name, value in zip(names, norms, strict=True) if not value.isfinite()), "all parameters together")
        bad_gradient = f"gradient of {first}"
    return bad_loss, bad_gradient


def _explain(fault: str, step: int, ids: Sequence[str], config: LoopConfig, context: DistributedContext) -> str:
    own = f"{fault!r} is not finite, frames: {', '.join(ids) or 'unknown'}" if fault else ""
    found = [f"rank {rank}: {m}" if context.world_size > 1 else m for rank, m in enumerate(context.gather(own)) if m]
    return (
        f"training stopped at step {step} (0-based; learning rate {learning_rate(config.optim, step):.3g}): {'; '.join(found)}. "
        f"The weights after {step} good steps are kept. Look at these frames, or train with a lower learning rate; "
        "resuming with the same configuration stops at the same step"
    )


def _how_to_resume(done: int, config: LoopConfig, run: RunFolder | None, context: DistributedContext) -> str:
    under = f" (under torchrun, {context.world_size} processes)" if context.world_size > 1 else ""  # which a rank cannot see
    how = f"resume with{under}: {run.resume_command}" if run is not None else "it had no run folder, so nothing was saved"
    return f"training was interrupted after {done} of {config.total_steps} steps; {how}"


def _resume(
    run: RunFolder | None,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    context: DistributedContext,
) -> int:
    """Load the newest checkpoint, if any; returns the number of steps done."""
    path = None if run is None else latest_checkpoint(run.checkpoints)
    if path is None:
        step = 0
    else:
        step, meta = load_checkpoint(path, modules, optimizer)
        if scaler.is_enabled():
            scaler.load_state_dict(meta["scaler"])
    context.any([False])  # every rank has read it before the main rank goes on to write
    return step


@contextmanager
def _status_of_failure(writer: RunFolder | None, config: LoopConfig) -> Iterator[None]:
    """Writes "failed" and the reason into status.json when anything else than a stop that is already described ends the loop."""
    try:
        yield
    except (NonFiniteLoss, Interrupted):
        raise
    except BaseException as error:
        if writer is not None:
            step = int(writer.status().get("step", 0))
            writer.set_status("failed", step=step, total_steps=config.total_steps, message=f"{type(error).__name__}: {error}")
        raise


def _names(modules: Mapping[str, nn.Module], parameters: Sequence[nn.Parameter]) -> list[str]:
    known = {p: f"{key}.{name}" for key, module in modules.items() for name, p in module.named_parameters()}
    strangers = [tuple(p.shape) for p in parameters if p not in known]
    if strangers:
        raise InvalidInput(
            f"trainable parameters of shapes {strangers[:5]} belong to none of the modules {sorted(modules)}; add theirs"
        )
    return [known[p] for p in parameters]


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


def _autocast(amp: str, device: torch.device) -> AbstractContextManager[object]:
    if amp == "off" or device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16 if amp == "bf16" else torch.float16)


class _Snapshot:
    """The buffers that a forward pass changes (batch-norm statistics), to undo a step that is not finite."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._pairs = [(buffer, buffer.clone()) for buffer in training_buffers(modules)]

    def restore(self) -> None:
        for buffer, copy in self._pairs:
            buffer.copy_(copy)

"""The training loop: resuming is bit-exact, what breaks is named, several processes equal one."""

import multiprocessing
import os
import pickle
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from upcycle3d.core.errors import Interrupted, InvalidInput, UpcycleError
from upcycle3d.core.structures import LossTerms
from upcycle3d.perception.training.checkpoint import CorruptCheckpoint, latest_checkpoint, list_checkpoints
from upcycle3d.perception.training.distributed import (
    DistributedContext,
    all_reduce_gradients,
    average_statistics,
    init_distributed,
    per_rank,
)
from upcycle3d.perception.training.ema import make_teacher, update_ema
from upcycle3d.perception.training.loop import LoopConfig, NonFiniteLoss, create_run, run_steps
from upcycle3d.perception.training.optim import OneCycle
from upcycle3d.perception.training.prefetch import prefetch
from upcycle3d.perception.training.run_folder import RunFolder
from upcycle3d.perception.training.step import step_seed

# Bits are compared between processes, and torch sums in another order with another number of threads.
pytestmark = pytest.mark.usefixtures("one_thread")

FORK = multiprocessing.get_context("fork")
CONFIG = LoopConfig(seed=3, optim=OneCycle(lr=0.05, total_steps=30), log_every=1, checkpoint_every=4, keep_checkpoints=2)


@dataclass(frozen=True, kw_only=True)
class ToyBatch:
    inputs: torch.Tensor
    targets: np.ndarray
    names: tuple[str, ...]


def batch_at(step: int) -> ToyBatch:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 3, generator=generator)
    return ToyBatch(inputs=inputs, targets=inputs.sum(1).numpy(), names=(f"frame_{step}a", f"frame_{step}b"))


class Toy:
    """A student with dropout and batch norm, and its teacher, as a trainer would hold them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.teacher = make_teacher(self.student)

    def loss(self, batch: ToyBatch, step: int) -> LossTerms:
        error = self.student(batch.inputs)[:, 0] - torch.from_numpy(batch.targets)
        return LossTerms(terms={"box": error.abs().mean(), "class": error.square().mean()})

    def weights(self) -> dict[str, torch.Tensor]:
        modules = {"student": self.student, "teacher": self.teacher}
        return {f"{m}.{name}": t.clone() for m, module in modules.items() for name, t in module.state_dict().items()}

    def train(self, run: RunFolder | None = None, config: LoopConfig = CONFIG, batches: Callable = batch_at, **options):
        return run_steps(
            modules={"student": self.student, "teacher": self.teacher},
            trainable=self.student.parameters(),
            batches=batches,
            loss=self.loss,
            config=config,
            run=run,
            after_step=lambda step: update_ema(self.teacher, self.student, step),
            frame_ids=lambda batch: batch.names,
            progress=False,
            **options,
        )


def open_run(path: Path, *, resume: bool = False) -> RunFolder:
    return RunFolder.create(path, CONFIG, seed=3, resume=resume, tracker="none")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(one_thread) -> dict[str, torch.Tensor]:
    toy = Toy()
    result = toy.train()
    assert (result.steps, result.start_step) == (30, 0)
    return toy.weights()


# ------------------------------------------------------------------------------------------------------------------ resuming


def _train_in_child(path: Path, delay: float) -> None:
    def slow(step: int) -> ToyBatch:
        time.sleep(delay)
        return batch_at(step)

    with open_run(path, resume=True) as run:
        Toy().train(run, batches=slow)


def test_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path, uninterrupted):
    path, dice = tmp_path / "run", random.Random(11)
    open_run(path).close()
    for kill_after in sorted(dice.sample(range(1, 28), 4)):
        child = FORK.Process(target=_train_in_child, args=(path, 0.002))
        child.start()
        deadline = time.monotonic() + 60
        while child.is_alive() and time.monotonic() < deadline:
            done = [m["step"] for m in RunFolder.open(path).metrics("train")]
            if done and done[-1] >= kill_after:
                break
            time.sleep(0.002)
        time.sleep(dice.random() * 0.02)  # anywhere: between steps, in a log line, in a checkpoint
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
    toy = Toy()
    with torch.no_grad():
        toy.student[0].weight.zero_()  # proves that the weights come from the checkpoint
    with open_run(path, resume=True) as run:
        result = toy.train(run)
    assert result.start_step > 0
    assert_equal(toy.weights(), uninterrupted)
    assert [m["step"] for m in run.metrics("train")] == list(range(1, 31))
    assert run.status()["state"] == "finished"


def test_a_finished_run_is_loaded_and_not_trained_again(tmp_path, uninterrupted):
    with open_run(tmp_path / "run") as run:
        Toy().train(run)
        before = run.metrics()
        toy = Toy()
        result = toy.train(run)
        assert (result.start_step, result.steps) == (30, 30)
        assert run.metrics() == before
    assert_equal(toy.weights(), uninterrupted)


def test_doing_what_the_message_about_a_damaged_checkpoint_says_resumes(tmp_path, uninterrupted):
    with open_run(tmp_path / "run") as run:
        Toy().train(run)
        older, newest = list_checkpoints(run.checkpoints)
        file = newest / "teacher.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
        advice = (
            rf"move what is damaged \({newest}\) out of {run.checkpoints}; .* resumes from the newest good checkpoint, {older}"
        )
        with pytest.raises(CorruptCheckpoint, match=advice):
            Toy().train(run)
        newest.rename(tmp_path / newest.name)
        toy = Toy()
        assert toy.train(run).start_step == 28
        assert [m["step"] for m in run.metrics("train")] == list(range(1, 31))
        assert list_checkpoints(run.checkpoints) == [older, newest]
    assert_equal(toy.weights(), uninterrupted)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_resume(tmp_path, uninterrupted):
    def interrupting(step: int) -> ToyBatch:
        if step == 12:
            signal.raise_signal(signal.SIGINT)
        return batch_at(step)

    handler = signal.getsignal(signal.SIGINT)
    with open_run(tmp_path / "run") as run:
        with pytest.raises(Interrupted, match=r"after 13 of 30 steps; resume with: .+ --resume$") as stopped:
            Toy().train(run, batches=interrupting)
        assert signal.getsignal(signal.SIGINT) is handler
        assert str(pickle.loads(pickle.dumps(stopped.value))) == str(stopped.value), (
            "it must reach the parent of a method's process"
        )
        assert run.status()["state"] == "interrupted"
        toy = Toy()
        assert toy.train(run).start_step == 13
    assert_equal(toy.weights(), uninterrupted)


@pytest.fixture
def python_handles_sigint():
    """A shell starts its background jobs with SIGINT ignored; a second Ctrl-C would then be ignored, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_sigint")
def test_a_second_ctrl_c_aborts_at_once(tmp_path):
    def impatient(step: int) -> ToyBatch:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return batch_at(step)

    with open_run(tmp_path / "run") as run:
        with pytest.raises(Interrupted, match=r"before its first checkpoint; resume with: .+ --resume$") as stopped:
            Toy().train(run, batches=impatient)
        assert stopped.value.signal == signal.SIGINT
        assert run.status()["state"] == "interrupted"
        assert latest_checkpoint(run.checkpoints) is None


@pytest.mark.usefixtures("python_handles_sigint")
def test_an_abort_that_comes_out_as_another_error_is_an_abort_all_the_same(tmp_path):
    """An import that Ctrl-C cuts off may swallow it, and whoever needs the module next fails in another way."""

    def half_imported(step: int) -> ToyBatch:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("partially initialized module")

    with open_run(tmp_path / "run") as run:
        with pytest.raises(Interrupted, match=r"--resume$"):
            Toy().train(run, batches=half_imported)
        assert run.status()["state"] == "interrupted"


# ---------------------------------------------------------------------------------------------------------- what goes wrong


def test_a_non_finite_loss_names_term_step_and_frames_and_keeps_the_good_weights(tmp_path):
    def poisoned(step: int) -> ToyBatch:
        batch = batch_at(step)
        return replace(batch, targets=batch.targets * np.float32("nan")) if step == 6 else batch

    toy, good = Toy(), Toy()
    with open_run(tmp_path / "run") as run:
        with pytest.raises(NonFiniteLoss, match=r"step 6 .*'box' is not finite, frames: frame_6a, frame_6b"):
            toy.train(run, batches=poisoned)
        assert run.status()["state"] == "failed"
        assert latest_checkpoint(run.checkpoints).name == "step_00000006"
        with pytest.raises(NonFiniteLoss):  # resuming meets the same step, and writes nothing twice
            Toy().train(run, batches=poisoned)
        assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step_00000004", "step_00000006"]
    with pytest.raises(NonFiniteLoss):
        good.train(batches=lambda step: batch_at(step) if step < 6 else poisoned(6))
    assert_equal(toy.weights(), good.weights())


def test_batch_norm_statistics_are_not_poisoned_by_the_bad_step(tmp_path):
    def poisoned(step: int) -> ToyBatch:
        batch = batch_at(step)
        return replace(batch, inputs=batch.inputs * float("inf")) if step == 6 else batch

    toy = Toy()
    with pytest.raises(NonFiniteLoss):
        toy.train(batches=poisoned)
    assert all(torch.isfinite(t).all() for t in toy.weights().values())
    assert toy.student[1].num_batches_tracked == 6


def test_a_non_finite_gradient_names_the_parameter():
    toy = Toy()
    weight = toy.student[4].bias
    toy.loss = lambda batch, step: LossTerms(terms={"root": (weight * 0).abs().sqrt().sum()})  # 0 * inf backwards
    with pytest.raises(NonFiniteLoss, match=r"gradient of student\.4\.bias"):
        toy.train()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda toy: LossTerms(), "the loss of step 0 has no term"),
        (lambda toy: LossTerms(terms={"a": torch.ones(())}), r"depends on a trainable parameter: \['a'\]"),
        (lambda toy: LossTerms(terms={"a": toy.student[0].weight.sum().bfloat16()}), "'a' must be a float32 scalar"),
        (lambda toy: LossTerms(terms={"a": toy.student[0].bias}), r"'a' must be a float32 scalar, found \(8,\)"),
        (lambda toy: LossTerms(terms={"lr": toy.student[0].bias.sum()}), r"share a name: \['lr'\]"),
    ],
)
def test_loss_terms_that_cannot_train_are_refused(loss, message):
    toy = Toy()
    toy.loss = lambda batch, step: loss(toy)
    with pytest.raises(InvalidInput, match=message):
        toy.train()


def test_a_trainable_parameter_outside_the_checkpoint_is_refused():
    toy = Toy()
    with pytest.raises(InvalidInput, match=r"belong to none of the modules \['teacher'\]"):
        run_steps(
            modules={"teacher": toy.teacher}, trainable=toy.student.parameters(), batches=batch_at, loss=toy.loss, config=CONFIG
        )


def test_gradients_are_clipped_to_the_norm():
    weight = nn.ParameterList([torch.zeros(2)])
    seen = []

    def run(limit: float) -> torch.Tensor:
        run_steps(
            modules={"w": weight},
            trainable=weight.parameters(),
            batches=lambda step: torch.tensor([30.0, 40.0]),
            loss=lambda batch, step: LossTerms(terms={"a": (weight[0] * batch).sum()}),
            after_step=lambda step: seen.append(weight[0].grad.clone()),
            config=LoopConfig(seed=0, optim=OneCycle(lr=0.1, total_steps=1), clip_norm=limit),
            progress=False,
        )
        return seen[-1]

    assert torch.allclose(run(10.0), torch.tensor([6.0, 8.0]))
    assert torch.equal(run(60.0), torch.tensor([30.0, 40.0]))
    assert torch.equal(run(float("inf")), torch.tensor([30.0, 40.0]))


def test_logs_hold_what_a_reader_needs(tmp_path):
    with open_run(tmp_path / "run") as run:
        Toy().train(run)
    line = run.metrics("train")[-1]
    assert line.keys() == {"step", "kind", "box", "class", "total_loss", "grad_norm", "lr", "seconds", "data_seconds"}
    assert line["total_loss"] == pytest.approx(line["box"] + line["class"])


def test_plain_lines_are_printed_where_there_is_no_terminal(capsys):
    config = replace(CONFIG, optim=OneCycle(lr=0.1, total_steps=4), log_every=2, amp="bf16")
    weight = nn.ParameterList([torch.ones(2)])
    run_steps(
        modules={"w": weight},
        trainable=weight.parameters(),
        batches=lambda step: step,
        loss=lambda batch, step: LossTerms(terms={"a": weight[0].square().sum()}),
        config=config,
    )
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "mixed precision (bf16) is for CUDA; training on the cpu in float32"
    assert [line.split("  ")[0] for line in lines[1:]] == ["step 2/4", "step 4/4"]


def test_step_seeds_differ_and_stay_the_same_for_ever():
    seeds = {step_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(3)}
    assert len(seeds) == 5 * 50 * 3
    assert step_seed(0, 0) == 728534652295568042


# --------------------------------------------------------------------------------------------------------------- prefetching


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_batches_in_order(workers):
    expected = [batch_at(step) for step in range(3, 10)]
    found = list(prefetch(batch_at, 3, 10, workers))
    assert [b.names for b in found] == [b.names for b in expected]
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(found, expected))
    assert all(isinstance(b.targets, np.ndarray) and np.array_equal(a.targets, b.targets) for a, b in zip(found, expected))


def test_training_with_workers_gives_the_same_bits(uninterrupted):
    toy = Toy()
    toy.train(workers=2)
    assert_equal(toy.weights(), uninterrupted)


def test_a_negative_number_of_processes_is_a_sentence():
    with pytest.raises(InvalidInput, match=r"processes that make batches \(--workers\) must be 0 or more, found -1"):
        next(prefetch(lambda step: step, 0, 2, -1))


def test_an_error_of_a_worker_arrives_as_it_is():
    def broken(step: int) -> int:
        if step == 1:
            raise InvalidInput("frame 000007 is cut")
        return step

    for workers in (0, 1):
        batches = prefetch(broken, 0, 4, workers)
        assert next(batches) == 0
        with pytest.raises(InvalidInput, match=r"^frame 000007 is cut$"):
            next(batches)


def test_a_worker_that_dies_is_a_sentence_about_the_shared_memory():
    def dying(step: int) -> int:
        if step == 1:
            os.kill(os.getpid(), signal.SIGBUS)  # what a full /dev/shm does
        return step

    batches = prefetch(dying, 0, 4, 1)
    with pytest.raises(
        UpcycleError, match=r"makes batches died: DataLoader worker .*(Bus error|exited unexpectedly).*/dev/shm, .*--workers 0"
    ):
        list(batches)


def test_a_file_that_a_worker_cannot_read_arrives_with_its_name():
    for workers in (0, 1):
        with pytest.raises(FileNotFoundError) as missing:
            next(prefetch(lambda step: Path("/nowhere/frame.bin").read_bytes(), 0, 2, workers))
        assert missing.value.filename == "/nowhere/frame.bin"


# ------------------------------------------------------------------------------------------------------------ several processes


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank_main(job, rank: int, port: int, answers) -> None:
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    context = init_distributed("cpu")
    try:
        answers.put((rank, job(context)))
    finally:
        context.close()


def on_two_ranks(job: Callable[[DistributedContext], object]) -> list:
    """What `job` returns on two gloo ranks, each a forked process."""
    answers, port = FORK.Queue(), _free_port()
    ranks = [FORK.Process(target=_rank_main, args=(job, rank, port, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(timeout=30)
        assert process.exitcode == 0
    return [found[0], found[1]]


def _half(step: int, rank: int, world_size: int) -> ToyBatch:
    batch, part = batch_at(step), slice(rank, None, world_size)
    return ToyBatch(inputs=batch.inputs[part], targets=batch.targets[part], names=(f"rank{rank}",))


def _linear() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    model.unused = nn.Parameter(torch.ones(2))
    return model


def _linear_gradient(context: DistributedContext, batches: Callable[[int], ToyBatch]) -> tuple:
    model, batch = _linear(), batches(0)
    (model(batch.inputs)[:, 0] - torch.from_numpy(batch.targets)).square().mean().backward()
    all_reduce_gradients(model.parameters(), context)
    return model.weight.grad.tolist(), model.bias.grad.tolist(), model.unused.grad is None


def _three_checks(context: DistributedContext) -> dict:
    batches = per_rank(_half, context)
    norm = nn.BatchNorm1d(3)
    norm(batches(0).inputs)
    frozen = nn.BatchNorm1d(3).eval()
    frozen.running_mean.fill_(context.rank)
    average_statistics([norm, frozen], context)

    def train(at: Callable[[int], ToyBatch]) -> list:
        model = _linear()
        run_steps(
            modules={"student": model},
            trainable=[model.weight, model.bias],
            batches=at,
            loss=lambda b, step: LossTerms(terms={"l": (model(b.inputs)[:, 0] - torch.from_numpy(b.targets)).square().mean()}),
            config=LoopConfig(seed=0, optim=OneCycle(lr=0.1, total_steps=5)),
            frame_ids=lambda b: b.names,
            context=context,
            progress=False,
        )
        return [model.weight.tolist(), model.bias.tolist()]

    def poisoned(step: int) -> ToyBatch:
        batch = batches(step)
        return replace(batch, targets=batch.targets * np.float32("nan")) if step == 2 and context.rank == 1 else batch

    try:
        train(poisoned)
        message = "trained through"
    except NonFiniteLoss as error:
        message = str(error)
    return {
        "gradient": _linear_gradient(context, batches),
        "statistics": norm.running_mean.tolist(),
        "frozen untouched": bool((frozen.running_mean == context.rank).all()),
        "weights": train(batches),
        "message": message,
    }


def test_two_ranks_equal_one_with_the_double_batch_and_stop_together():
    one = DistributedContext()
    first, second = on_two_ranks(_three_checks)
    assert first == second
    gradient = _linear_gradient(one, batch_at)
    assert np.allclose(first["gradient"][0], gradient[0], atol=1e-6)
    assert np.allclose(first["gradient"][1], gradient[1], atol=1e-6)
    assert first["gradient"][2], "a parameter without gradient on all ranks stays without"
    assert np.allclose(first["statistics"], 0.1 * batch_at(0).inputs.mean(0), atol=1e-6)
    assert first["frozen untouched"]
    model = _linear()
    run_steps(
        modules={"student": model},
        trainable=[model.weight, model.bias],
        batches=batch_at,
        loss=lambda b, step: LossTerms(terms={"l": (model(b.inputs)[:, 0] - torch.from_numpy(b.targets)).square().mean()}),
        config=LoopConfig(seed=0, optim=OneCycle(lr=0.1, total_steps=5)),
        progress=False,
    )
    assert np.allclose(first["weights"][0], model.weight.tolist(), atol=1e-5)
    assert "step 2" in first["message"]
    assert "rank 1: 'l' is not finite, frames: rank1" in first["message"]
    assert "rank 0:" not in first["message"]


def _create_twice(folder: Path, context: DistributedContext) -> list:
    found = []
    for _ in range(2):
        try:
            run = create_run(folder / "run", CONFIG, seed=0, context=context)
            found.append(run.writable)
        except InvalidInput as error:
            found.append("already holds a run" in str(error))
    return found


def test_only_the_main_rank_writes_and_its_errors_reach_all(tmp_path):
    assert on_two_ranks(lambda context: _create_twice(tmp_path, context)) == [[True, True], [False, True]]


def test_half_of_torchruns_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidInput, match="start several processes with torchrun"):
        init_distributed("cpu")

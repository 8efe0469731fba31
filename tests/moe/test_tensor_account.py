"""Every tensor is read once and written once; the first that is not is named, so that no converter loses weights in silence."""

import pytest
import torch
from torch import nn

import moe_lookalikes as look
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.surgery.batch_norm import recalibrate_batch_norm
from upcycle3d.perception.moe.surgery.tensor_account import TensorLedger, poisoned_copy


def ledger() -> TensorLedger:
    source = {"a": torch.ones(2, 3), "b": torch.zeros(3)}
    return TensorLedger([source, dict(source)], {"a": torch.full((2, 3), float("nan")), "c": torch.full((3,), float("nan"))})


def test_a_full_account_closes_and_shows_its_sums():
    book = ledger()
    book.write("a", (book.read(0, "a", "averaged") + book.read(1, "a", "averaged")) / 2, "average")
    book.read(0, "b", "dropped on purpose")
    book.write("c", book.read(1, "b", "renamed"), "renamed")
    account = book.close()
    assert torch.equal(book.target["a"], torch.ones(2, 3))
    assert account.written == (("a", "average"), ("c", "renamed"))
    assert str(account).startswith("2 tensors written, 4 read, each once\n  written: 1 average")
    assert ("1:b", "renamed") in account.read


def test_what_is_left_over_is_named():
    book = ledger()
    book.write("a", torch.ones(2, 3), "made")
    with pytest.raises(InvalidInput, match=r"tensor 'c' \(3,\) float32 of the new model was never written"):
        book.close()
    book.write("c", torch.ones(3), "made")
    with pytest.raises(
        InvalidInput, match=r"tensor 'a' \(2, 3\) float32 of model 0 was never read, so the new model would lose it"
    ):
        book.close()


def test_nothing_is_used_twice_or_made_up():
    book = ledger()
    book.read(0, "a", "averaged")
    with pytest.raises(InvalidInput, match="'a' of model 0 is used twice: averaged, and copied"):
        book.read(0, "a", "copied")
    with pytest.raises(InvalidInput, match="model 1 has no tensor 'z'"):
        book.read(1, "z", "copied")
    book.mark_written("a", "experts")
    with pytest.raises(InvalidInput, match="'a' of the new model is written twice: experts, and average"):
        book.write("a", torch.ones(2, 3), "average")
    with pytest.raises(InvalidInput, match="no tensor 'z' to write"):
        book.write("z", torch.ones(2), "average")
    with pytest.raises(InvalidInput, match=r"'c' is \(3,\) float32 in the new model, and average gives \(4,\) float32"):
        book.write("c", torch.ones(4), "average")


def test_a_poisoned_copy_holds_nothing_of_the_original_and_leaves_it_alone():
    model = look.randomized(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    model.register_buffer("table", torch.arange(3.0), persistent=False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    twin = poisoned_copy(model)
    assert all(value.isnan().all() for value in twin.state_dict().values() if value.is_floating_point())
    assert int(twin[1].num_batches_tracked) < 0
    assert torch.equal(twin.table, torch.arange(3.0))
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_running_statistics_are_measured_again_and_nothing_else_changes():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)).train()
    model[0].running_mean.fill_(50.0)
    weights = model[2].weight.clone()
    batches = torch.randn(4, 100, 3, generator=torch.Generator().manual_seed(0)) + 2
    count = recalibrate_batch_norm(model, lambda m: [m(batch) for batch in batches] and None)
    assert count == 1
    torch.testing.assert_close(model[0].running_mean, batches.mean((0, 1)))
    torch.testing.assert_close(model[0].running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert (model[0].momentum, model.training, model[0].training, model[1].training) == (0.1, True, True, True)
    assert torch.equal(weights, model[2].weight)
    with pytest.raises(InvalidInput, match="no batch norm"):
        recalibrate_batch_norm(nn.Linear(2, 2), lambda m: None)
    with pytest.raises(InvalidInput, match="never reached the batch norm '0'"):
        recalibrate_batch_norm(model, lambda m: None)

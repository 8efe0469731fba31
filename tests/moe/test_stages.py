"""Stages train exactly what they say, and everything else stays as it was, bit by bit."""

import pytest
import torch
from torch import Tensor, nn

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.contrastive.loss import contrastive_loss
from upcycle3d.perception.moe.contrastive.stages import FrozenState, MixtureParts, freeze, modules_of


class Block(nn.Module):
    """A block with an FFN, a router and a batch norm: what the stages divide."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.router = nn.Linear(4, 2, bias=False)
        self.ffn = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.router(x).softmax(-1)[:, :1] * self.ffn(x)


class Towers(nn.Module):
    """Two towers, as in a contrastive model."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(Block(), Block(), nn.Linear(4, 3))
        self.text = nn.Sequential(Block(), nn.Linear(4, 3))

    def loss(self, x: Tensor) -> Tensor:
        return contrastive_loss(self.image(x), self.text(x + 0.1), 5.0)


PARTS = MixtureParts(
    ffn=("image.0.ffn", "image.1.ffn", "text.0.ffn"), router=("image.0.router", "image.1.router", "text.0.router")
)


def train(model: Towers, x: Tensor, *, evaluation: bool) -> None:
    model.train(not evaluation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()


@pytest.mark.parametrize("stage", ["ffn", "router", "all_but_router"])
def test_only_the_stage_trains_and_the_rest_stays_bit_identical(stage):
    """Gradients left from before, and weight decay, must not move a frozen tensor."""
    torch.manual_seed(0)
    model, x = Towers(), torch.randn(6, 4)
    model.loss(x).backward()  # gradients of an earlier stage
    tensors = freeze(model, stage, PARTS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = FrozenState.of(model, tensors)
    train(model, x, evaluation=True)
    state.check(model)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(tensors.trained)
    named = PARTS.ffn if stage == "ffn" else PARTS.router
    own = {name for name in before if name.startswith(named)}
    parameters = {name for name, _ in model.named_parameters()}
    assert set(tensors.trained) == (parameters - own if stage == "all_but_router" else own)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(tensors.trained)
    assert tensors.elements == sum(p.numel() for p in model.parameters() if p.requires_grad)
    if stage != "all_but_router":
        assert set(tensors.trained) | set(tensors.frozen) == set(before)
    assert str(len(tensors.trained)) in str(tensors)


def test_a_batch_norm_in_training_mode_is_noticed():
    """Its weights are frozen and its statistics move all the same: the usual fault of frozen towers."""
    torch.manual_seed(0)
    model, x = Towers(), torch.randn(6, 4)
    state = FrozenState.of(model, freeze(model, "ffn", PARTS))
    train(model, x, evaluation=False)
    assert "image.0.norm.running_mean" in state.changed(model)
    with pytest.raises(InvalidInput, match=r"call eval\(\)"):
        state.check(model)


def test_a_change_of_one_bit_is_noticed_in_every_type():
    """Equality of floats would miss -0.0 against 0.0, and would call NaN a change."""
    model = nn.Module()
    model.part = nn.Linear(1, 1)
    model.register_buffer("zero", torch.zeros(2, dtype=torch.bfloat16))
    model.register_buffer("nan", torch.tensor(torch.nan))
    model.register_buffer("flag", torch.tensor([True, False]))
    model.register_buffer("empty", torch.zeros(0, 3))
    state = FrozenState.of(model, freeze(model, "ffn", MixtureParts(ffn=("part",))))
    state.check(model)
    model.zero[1] = -0.0
    assert state.changed(model) == ("zero",)
    del model.empty
    assert state.changed(model) == ("zero", "empty")


def test_tied_tensors_and_wrong_names_are_refused():
    model = Towers()
    with pytest.raises(InvalidInput, match=r"no part 'image\.9\.ffn'"):
        freeze(model, "ffn", MixtureParts(ffn=("image.9.ffn",)))
    with pytest.raises(InvalidInput, match="no parameter to train"):
        freeze(model, "router", MixtureParts())
    with pytest.raises(InvalidInput, match="stage must be one of ffn"):
        freeze(model, "experts", PARTS)
    model.text[1].weight = model.image[2].weight
    model.image[0].ffn[0].weight = model.image[1].ffn[0].weight  # both train: legal
    assert freeze(model, "ffn", PARTS).elements == 3 * 76 - 32
    model.text[0].ffn[2].bias = model.text[0].norm.weight
    with pytest.raises(InvalidInput, match="are one tensor"):
        freeze(model, "ffn", PARTS)


def test_modules_are_named_by_class_without_those_inside():
    model = Towers()
    assert modules_of(model, Block) == ("image.0", "image.1", "text.0")
    assert modules_of(model, (Block, nn.Linear)) == ("image.0", "image.1", "image.2", "text.0", "text.1")
    assert modules_of(model, nn.Conv2d) == ()

"""What the tests of carved models share: a dense model with data in domains, and its carving."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moe_lookalikes as look
from upcycle3d.perception.moe.carving.activity import Activity, measure_activity
from upcycle3d.perception.moe.carving.splits import readme_split
from upcycle3d.perception.moe.carving.units import Carving
from upcycle3d.perception.moe.layers.dense_ffn import DenseFfn
from upcycle3d.perception.moe.layers.routing import Routing
from upcycle3d.perception.moe.surgery.replacement import plan_replacement


def domains_of(name: str, count: int = 3) -> dict[str, list[Tensor]]:
    """Two batches of each domain; domains differ in scale and direction, so their units differ."""
    shift = torch.randn(count, 12, generator=torch.Generator().manual_seed(3))
    made = {}
    for number in range(count):
        batches = [look.tokens(look.MODELS[name].dims, seed=10 * number + i) for i in range(2)]
        shape = (12, *[1] * look.MODELS[name].dims)
        made[f"domain {number}"] = [x + 1.5 * shift[number].view(shape) for x in batches]
    return made


def carved(name: str, ratio: float = 0.5, count: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Carving]:
    """A dense model and its Read-ME carving."""
    model = look.randomized(look.MODELS[name].make()).to(dtype)
    return model, readme_split(activity_of(model, name, count), ratio)


def activity_of(model: nn.Module, name: str, count: int = 3) -> Activity:
    plan = plan_replacement(model, experts=count, active=1)
    dtype = next(model.parameters()).dtype
    return measure_activity(
        model, plan, {d: [x.to(dtype) for x in xs] for d, xs in domains_of(name, count).items()}, lambda m, x: m(x)
    )


def decision(index: Tensor, experts: int, dtype: torch.dtype = torch.float64) -> Routing:
    """One expert per token or scene with the weight 1."""
    index = index.reshape(-1, 1)
    probs = torch.nn.functional.one_hot(index[:, 0], experts).to(dtype)
    return Routing(logits=None, probs=probs, index=index, weight=torch.ones(index.shape, dtype=dtype))


def random_ffn(
    width: int = 6, hidden: int = 10, out: int = 5, *, gated: bool, bias: bool = True, act: str = "silu", seed: int = 0
) -> DenseFfn:
    draw = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return DenseFfn(
        up=made(hidden, width),
        gate=made(hidden, width) if gated else None,
        down=made(out, hidden),
        up_bias=made(hidden) if bias else None,
        gate_bias=made(hidden) if gated and bias else None,
        down_bias=made(out) if bias else None,
        activation=act,  # type: ignore[arg-type]
    )

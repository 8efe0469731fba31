"""Join mixtures that several data owners trained apart, without joint training (FlexOlmo; Shi et al., 2025).

Each owner gets the same frozen seed as expert 0, trains experts of their own and their rows of the router, and changes nothing else. The
joined mixture has the seed and all owners' experts. An owner who opts out is left out of the list, and nothing of theirs remains.

Read next: `upcyclers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, require
from ..layers.bank import ExpertBank
from ..layers.moe_ffn import MoeFfn, moe_layers
from ..layers.routers import TopKRouter
from ..layers.routing import TopKRule
from ..surgery.tensor_account import TensorLedger, poisoned_copy
from .upcyclers import Upcycled, saved_tensors


def join_mixtures(mixtures: Sequence[nn.Module], rule: TopKRule) -> Upcycled:
    """Join mixtures whose expert 0 and whose tensors outside the mixtures are equal bit by bit.

    Args:
        mixtures: One model per owner, each with two or more experts and a `TopKRouter` in every place.
        rule: How the joined router chooses.

    Returns:
        The joined model: expert 0, then the other experts in the order of the owners. The account says what became of every tensor.

    Raises:
        InvalidInput: A model has no mixtures or other ones, its router is of another kind, or it changed a tensor that had to stay frozen;
            the message names the first.
    """
    require(bool(mixtures), "found no mixture to join: pass at least one")
    layers = [dict(moe_layers(model)) for model in mixtures]
    for number, found in enumerate(layers):
        if not found or found.keys() != layers[0].keys():
            raise InvalidInput(
                f"model {number} has mixtures at {list(found)[:3]} and model 0 at {list(layers[0])[:3]}; upcycle all owners' models with "
                "one plan"
            )
    twin = poisoned_copy(mixtures[0])
    for name, layer in moe_layers(twin):
        joined = _joined([found[name] for found in layers], name, rule)
        layer.bank, layer.router, layer.usage = joined.bank, joined.router, joined.usage
    ledger = TensorLedger([saved_tensors(model) for model in mixtures], saved_tensors(twin))
    inside = tuple(f"{name}." for name, module in twin.named_modules(remove_duplicate=False) if isinstance(module, MoeFfn))
    for number, source in enumerate(ledger.sources):
        for name in source:
            if name.startswith(inside):
                ledger.read(number, name, "became experts and router rows")
            elif name not in ledger.target or not torch.equal(source[name], ledger.sources[0][name]):
                raise InvalidInput(
                    f"the tensor {name!r} of model {number} differs from that of model 0, and owners must leave it frozen"
                )
            else:
                ledger.read(number, name, "kept, equal in all models")
    for name in ledger.target:
        if name.startswith(inside):
            ledger.mark_written(name, "experts and router rows")
        else:
            ledger.write(name, ledger.sources[0][name], "kept, equal in all models")
    return Upcycled(model=twin, plan=None, account=ledger.close())


def _joined(parts: Sequence[MoeFfn], name: str, rule: TopKRule) -> MoeFfn:
    """One mixture of the experts and the router rows of several."""
    experts, rows, biases = [parts[0].bank.to_dense(0)], [], []
    for number, part in enumerate(parts):
        router, seed = part.router, part.bank.to_dense(0)
        if not isinstance(router, TopKRouter):
            raise InvalidInput(
                f"the router at {name!r} of model {number} is a {type(router).__name__}; only rows of a TopKRouter can be joined"
            )
        for tensor, values in seed.tensors().items():
            require(
                tensor in experts[0].tensors() and torch.equal(values, experts[0].tensors()[tensor]),
                f"expert 0 at {name!r} of model {number} has another `{tensor}` than that of model 0, and owners must leave it frozen",
            )
        first = 1 if number else 0  # the seed's own row comes from model 0
        experts += [part.bank.to_dense(expert) for expert in range(1, part.bank.shape.experts)]
        rows.append(router.weight[first:])
        biases.append(router.bias[first:] if router.bias is not None else None)
    present = [bias for bias in biases if bias is not None]
    require(len(present) in (0, len(parts)), f"only some of the routers at {name!r} have a bias; their logits cannot be compared")
    bias: Tensor | None = torch.cat(present).detach() if present else None
    bank = ExpertBank.from_dense([expert.clone() for expert in experts], dropout=parts[0].bank.shape.dropout)
    return MoeFfn(bank, TopKRouter.from_rows(torch.cat(rows).detach(), rule, bias=bias), backend=parts[0].backend)

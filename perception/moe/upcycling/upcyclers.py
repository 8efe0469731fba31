"""Make a mixture of experts from dense models without training: pure functions, and every tensor is accounted for.

| function | experts | everything else | source |
|---|---|---|---|
| `sparse_copy` | copies of one FFN | the same model's | Komatsuzaki et al., 2023 |
| `drop_upcycling` | copies with a share of their hidden units drawn again | the same model's | Nakamura et al., 2025 |
| `btx` | one of each specialist, and of the seed if it is given | average, or the seed's | Sukhbaatar et al., 2024 |
| `soup` | none: the result is dense | average | Wortsman et al., 2022 |
| `wider_dense` | one, as wide as the active experts of a mixture | the same model's | a baseline |

Branch-attend-mix, which mixes attentions too, is in `bam.py`; copies that follow clusters of the data are in `cluster_aware.py`.
The models that are given are not changed. Read next: `ffn_changes.py`, which changes single FFNs; `joined_mixtures.py`; `replacement.py`.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_numbers
from ..attention.attention_sites import AttentionPlan
from ..layers.bank import ExpertBank
from ..layers.control_routers import UniformRouter
from ..layers.dense_ffn import DenseFfn
from ..layers.moe_ffn import MoeFfn
from ..layers.routers import Router, SoftRouter, TopKRouter
from ..layers.routing import TopKRule
from ..surgery.common_seed import require_common_seed, require_same_structure
from ..surgery.ffn_sites import FfnSite
from ..surgery.replacement import ReplacementPlan
from ..surgery.tensor_account import TensorAccount, TensorLedger, poisoned_copy
from .ffn_changes import redraw_units, scaled, widened

RouterMaker = Callable[[FfnSite, Tensor], Router]
"""Makes the router of one FFN; the tensor tells type and device."""

Rest = Literal["average", "seed"]
"""Where the tensors outside the FFNs come from: the `average` of all models, or the `seed` alone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Upcycled:
    """A model that was made of dense ones."""

    model: nn.Module
    """The new model. It shares no memory with the dense ones."""
    plan: ReplacementPlan | None
    """What was replaced; None for a dense result and for joined mixtures."""
    account: TensorAccount
    """What became of every tensor."""
    attentions: AttentionPlan | None = None
    """Which attentions became mixtures; None where there are none."""

    def __repr__(self) -> str:
        plans = ((self.plan, "FFNs"), (self.attentions, "attentions"))
        parts = ", ".join(f"{len(plan.sites)} {what} with {plan.experts} experts" for plan, what in plans if plan is not None)
        return f"Upcycled({type(self.model).__name__}, {parts or 'without a plan'})"


@dataclass(frozen=True, kw_only=True)
class RandomRouters:
    """Makes linear routers with random rows. The same seed gives the same rows for the same name."""

    experts: int
    """Number of experts."""
    rule: TopKRule | None
    """How logits become choices; None for soft routing, in which every expert serves every token."""
    seed: int = 0
    """Number that the rows depend on. Change it for another run."""
    std: float = 0.02
    """Standard deviation of the rows. BTX uses 0.02; smaller values start nearer to a uniform choice."""

    def __call__(self, site: FfnSite, like: Tensor) -> Router:
        """Make the router of one FFN.

        Args:
            site: The FFN.
            like: Tensor of the router's type and device.

        Returns:
            The router.
        """
        rows = torch.randn(self.experts, site.width_in, generator=generator_of(self.seed, site.name)) * self.std
        rows = rows.to(like)
        return SoftRouter.from_rows(rows) if self.rule is None else TopKRouter.from_rows(rows, self.rule)


def sparse_copy(seed: nn.Module, plan: ReplacementPlan, routers: RouterMaker) -> Upcycled:
    """Make every expert a copy of the dense FFN. With renormalized routing the result computes what the dense model computes.

    Args:
        seed: The dense model.
        plan: What is replaced.
        routers: Makes the routers.

    Returns:
        The mixture.
    """
    return gather([seed], plan, lambda site, dense: expert_layer(plan, site, [dense[0]] * plan.experts, routers))


def drop_upcycling(
    seed: nn.Module, plan: ReplacementPlan, routers: RouterMaker, *, share: float = 0.5, draw: int = 0
) -> Upcycled:
    """Copy the dense FFN and draw a share of each copy's hidden units again, so the experts differ from the start.

    Args:
        seed: The dense model.
        plan: What is replaced.
        routers: Makes the routers.
        share: Share of the hidden units that are drawn again. The paper found 0.5 best.
        draw: Number that the choice of the units and their values depend on.

    Returns:
        The mixture. It computes something else than the dense model unless `share` is 0.

    Raises:
        InvalidInput: `share` is not in 0..1.
    """
    require_numbers("drop_upcycling", least=0.0, most=1.0, share=share)

    def mixture(site: FfnSite, dense: Sequence[DenseFfn]) -> MoeFfn:
        experts = [redraw_units(dense[0], share, generator_of(draw, f"{site.name}:{i}")) for i in range(plan.experts)]
        return expert_layer(plan, site, experts, routers)

    return gather([seed], plan, mixture)


def btx(
    specialists: Sequence[nn.Module],
    plan: ReplacementPlan,
    routers: RouterMaker,
    *,
    seed: nn.Module | None = None,
    rest: Rest = "average",
    expert_scale: float = 1.0,
    allow_strangers: bool = False,
) -> Upcycled:
    """Branch-train-mix: the FFNs of several models become experts, and everything else is averaged or the seed's.

    Args:
        specialists: Models that were branched from one seed and trained on different data.
        plan: What is replaced. It needs as many experts as there are models.
        routers: Makes the routers. The paper uses the top 2, renormalized; a soft router is a control that must not be left out.
        seed: The common seed, to keep it as expert 0 and in the average; None to leave it out.
        rest: Where the other tensors come from. `seed` keeps a part unchanged that other programs share, such as a vehicle's encoder.
        expert_scale: Factor of the experts' outputs. A top-1 rule without renormalization weighs its expert by a probability not far
            above 1 / E at first, so the mixture starts much weaker than the dense FFN; the number of experts corrects that.
        allow_strangers: Go on with models that do not come from one seed.

    Returns:
        The mixture.

    Raises:
        InvalidInput: The models differ in structure or have no common seed, or `rest` is `seed` and none was given.
    """
    require(rest != "seed" or seed is not None, "rest='seed' keeps the seed's tensors, and no seed was given; pass seed=")
    models = [*([] if seed is None else [seed]), *specialists]
    require_same_structure(models)
    require_common_seed(models, [name for site in plan.sites for name in site.tensors], allow_strangers=allow_strangers)

    def mixture(site: FfnSite, dense: Sequence[DenseFfn]) -> MoeFfn:
        return expert_layer(plan, site, [scaled(ffn, expert_scale) for ffn in dense], routers)

    return gather(models, plan, mixture, rest)


def soup(models: Sequence[nn.Module], *, allow_strangers: bool = False) -> Upcycled:
    """Average models. The result is dense and costs what one of them costs.

    Args:
        models: Models that were branched from one seed.
        allow_strangers: Go on with models that do not come from one seed.

    Returns:
        The average.
    """
    require_same_structure(models)
    require_common_seed(models, allow_strangers=allow_strangers)
    twin = poisoned_copy(models[0])
    ledger = TensorLedger([saved_tensors(model) for model in models], saved_tensors(twin))
    _write_rest(ledger, "average")
    return Upcycled(model=twin, plan=None, account=ledger.close())


def wider_dense(seed: nn.Module, plan: ReplacementPlan, *, draw: int = 0) -> Upcycled:
    """Make each FFN as wide as the active experts of a mixture together: the dense model of equal active compute to compare with.

    Args:
        seed: The dense model.
        plan: The plan of the mixture; `plan.active` times the hidden units.
        draw: Number that the values of the new units depend on.

    Returns:
        A dense model that computes what `seed` computes; each FFN is a bank of one expert, which serves every token.
    """

    def layer(site: FfnSite, dense: Sequence[DenseFfn]) -> MoeFfn:
        wide = widened(dense[0], plan.active, generator_of(draw, site.name))
        return MoeFfn(ExpertBank.from_dense([wide], dropout=site.dropout), UniformRouter(1))

    made = gather([seed], plan, layer)
    return Upcycled(model=made.model, plan=None, account=made.account)


def step_zero_difference(dense: nn.Module, upcycled: nn.Module, run: Callable[[nn.Module], Tensor]) -> float:
    """Compare a fresh mixture with the dense model: the first thing to look at after upcycling.

    Args:
        dense: The dense model.
        upcycled: The mixture.
        run: Runs a model on some inputs and returns one tensor. It is called once with each, in evaluation mode without gradients.

    Returns:
        Largest absolute difference. Copies with renormalized routing leave rounding errors, about 1e-4 in the logits of a language model.
    """
    outputs = []
    for model in (dense, upcycled):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                outputs.append(run(model).double())
        finally:
            for module, training in modes:
                module.training = training
    return float((outputs[0] - outputs[1]).abs().max()) if outputs[0].numel() else 0.0


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Get the tensors that a checkpoint of the model holds.

    Args:
        model: Any model.

    Returns:
        Name to tensor, sharing memory with the model.
    """
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def generator_of(seed: int, name: str) -> torch.Generator:
    """Make the source of random numbers of one part of a model.

    Args:
        seed: Number of the run.
        name: Name of the part.

    Returns:
        The source; equal arguments give equal numbers.
    """
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))


def gather(
    models: Sequence[nn.Module],
    plan: ReplacementPlan,
    layer_of: Callable[[FfnSite, Sequence[DenseFfn]], MoeFfn],
    rest: Rest = "average",
    also: Callable[[nn.Module], Callable[[TensorLedger], None]] | None = None,
) -> Upcycled:
    """Put a layer in each place of the plan, write everything else, and account for every tensor: what every upcycler here ends with.

    Args:
        models: The dense models, the first of which lends its structure.
        plan: What is replaced.
        layer_of: Makes the layer of one FFN from the FFNs of all models.
        rest: Where the other tensors come from.
        also: Replaces other parts of the new model, such as attentions. It returns what records their tensors.

    Returns:
        The new model.

    Raises:
        InvalidInput: A model has another structure than the planned one, or no values; or a tensor is left over.
    """
    for number, model in enumerate(models):
        plan.check(model, f"model {number}")
        if empty := next((name for name, tensor in saved_tensors(model).items() if tensor.is_meta), None):
            raise InvalidInput(
                f"the tensor {empty!r} of model {number} has no values (device meta); load the weights before upcycling"
            )
    sources = [saved_tensors(model) for model in models]
    norms = _shared_norms(sources, plan, rest) if plan.batch_norm == "share" else None
    layers = {site.name: layer_of(site, [site.read(tensors, norms) for tensors in sources]) for site in plan.sites}
    twin = poisoned_copy(models[0])
    plan.apply(twin, layers)
    record = None if also is None else also(twin)
    ledger = TensorLedger(sources, saved_tensors(twin))
    if record is not None:
        record(ledger)
    for name, module in twin.named_modules(remove_duplicate=False):
        if isinstance(module, MoeFfn):
            for inner in saved_tensors(module):
                ledger.mark_written(f"{name}.{inner}", "experts" if inner.startswith("bank.") else "router")
    for site in plan.sites:
        for number in range(len(models)):
            for name in _every_name(site, models[number]):
                ledger.read(number, name, "became experts")
    _write_rest(ledger, rest)
    return Upcycled(model=twin, plan=plan, account=ledger.close())


def expert_layer(plan: ReplacementPlan, site: FfnSite, experts: Sequence[DenseFfn], routers: RouterMaker) -> MoeFfn:
    """Join experts and a router, and refuse what the plan's numbers are not true of.

    Args:
        plan: The plan.
        site: The FFN that is replaced.
        experts: The experts.
        routers: Makes the router.

    Returns:
        The layer, whose bank was compared with the experts bit by bit.

    Raises:
        InvalidInput: The number of experts, or of active ones, is not the plan's.
    """
    require(
        len(experts) == plan.experts,
        f"the plan has {plan.experts} experts for {site.name!r}, and {len(experts)} models were given; plan with experts={len(experts)}",
    )
    router = routers(site, experts[0].up)
    active = router.rule.k if isinstance(router, TopKRouter) else plan.experts if isinstance(router, SoftRouter) else plan.active
    if router.num_experts != plan.experts or active != plan.active:
        raise InvalidInput(
            f"the router of {site.name!r} uses {active} of {router.num_experts} experts, and the plan counted {plan.active} of "
            f"{plan.experts}; plan with the router's numbers"
        )
    bank = ExpertBank.from_dense(experts, dropout=site.dropout)
    _require_read_back(bank, experts, site)
    return MoeFfn(bank, router)


def _every_name(site: FfnSite, model: nn.Module) -> list[str]:
    """Names of a site's tensors; a layer that is used in several places has several names for each."""
    names: dict[int, list[str]] = {}
    own: dict[str, int] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names.setdefault(id(tensor), []).append(name)
        own[name] = id(tensor)
    return [alias for name in site.tensors for alias in names[own[name]]]


def _require_read_back(bank: ExpertBank, experts: Sequence[DenseFfn], site: FfnSite) -> None:
    """Refuse a bank that holds anything else than the experts, bit by bit."""
    held = 0
    for number, expert in enumerate(experts):
        found, wanted = bank.to_dense(number).tensors(), expert.tensors()
        held += sum(tensor.numel() for tensor in found.values())
        for name in [*wanted, *(name for name in found if name not in wanted)]:
            good = name in found and torch.equal(found[name], wanted.get(name, torch.zeros_like(found[name])))
            if not good:
                raise InvalidInput(f"expert {number} of {site.name!r} lost `{name}` on its way into the bank")
    stored = sum(parameter.numel() for parameter in bank.parameters())
    require(held == stored, f"the bank of {site.name!r} stores {stored:,} numbers, and its experts are {held:,}")


def _write_rest(ledger: TensorLedger, rest: Rest) -> None:
    """Write every tensor of the target that is not written yet."""
    moved = []
    hows = ["averaged" if len(ledger.sources) > 1 and rest == "average" else "kept"] * len(ledger.sources)
    if rest == "seed":
        hows[1:] = ["left out for the seed's"] * (len(hows) - 1)
    done = ledger.written
    for name in [name for name in ledger.target if name not in done]:
        values = [ledger.read(number, name, how) for number, how in enumerate(hows)]
        ledger.write(name, _combined(name, values, rest), hows[0])
        if rest == "average" and name.endswith("running_var") and not all(torch.equal(values[0], value) for value in values[1:]):
            moved.append(name.removesuffix(".running_var"))
    if moved:
        warnings.warn(
            f"the running statistics of {len(moved)} batch norms differ between the models and were averaged, which fits none of them "
            f"({moved[0]!r} is the first); call recalibrate_batch_norm on data of all domains before the evaluation",
            stacklevel=4,
        )


def _combined(name: str, values: Sequence[Tensor], rest: Rest) -> Tensor:
    """The seed's tensor, or the mean in float64. Equal tensors stay as they are, bit by bit."""
    first = values[0]
    if rest == "seed" or all(torch.equal(first, value) for value in values[1:]):
        return first
    if first.is_floating_point():
        return torch.stack([value.to(first.device, torch.float64) for value in values]).mean(0).to(first.dtype)
    if name.endswith("num_batches_tracked"):
        return torch.stack(list(values)).amax(0)
    raise InvalidInput(f"tensor {name!r} holds whole numbers that differ between the models, so they cannot be averaged")


def _shared_norms(sources: Sequence[Mapping[str, Tensor]], plan: ReplacementPlan, rest: Rest) -> dict[str, Tensor]:
    """The common batch norms inside the plan's FFNs."""
    spots = [spot.norm for site in plan.sites for spot in (site.up, site.down) if spot.norm is not None]
    return {name: _combined(name, [source[name] for source in sources], rest) for norm in spots for name in norm.names}

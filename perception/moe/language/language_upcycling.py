"""Mix a language model and its specialists by BAM or a baseline, and write the result: the work of `upcycle3d moe bam` and
`upcycle3d moe baseline`.

The baselines use the same code and the same training as BAM, so a difference between two results is one of the methods.
Read next: `bam.py`, `upcyclers.py`; `phases.py`, which trains what is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from torch import nn

from ....core.errors import InvalidInput, require
from ....core.new_folder import new_folder, require_empty
from ..attention.attention_sites import plan_attentions
from ..attention.soft_attention import KeyValues
from ..checkpoints.mixtral import EXPERTS_NAME, MixtralLayout, save_as_mixtral
from ..layers.moe_ffn import moe_layers
from ..layers.routing import TopKRule
from ..surgery.replacement import plan_replacement
from ..upcycling.bam import AttentionRouting, bam
from ..upcycling.cluster_aware import cluster_aware, collect_inputs
from ..upcycling.joined_mixtures import join_mixtures
from ..upcycling.owner_training import freeze_for_owner
from ..upcycling.upcyclers import RandomRouters, Upcycled, btx, drop_upcycling, soup, sparse_copy, wider_dense
from .language_models import LanguageModel, save_language_mixture
from .language_plans import BaselineMethod, MixOptions, ModelFormat, rule_of
from .phases import TextPhase, speaker, train_on
from .specialists import write_dense
from .text_scores import longest_row
from .text_training import TokenDomains


def mix_bam(
    seed: LanguageModel, specialists: Sequence[nn.Module], options: MixOptions, *, key_values: KeyValues = "expert"
) -> Upcycled:
    """Mix the seed and its specialists by BAM.

    Args:
        seed: The dense model.
        specialists: Its specialists.
        options: How FFNs are mixed, and which parts.
        key_values: Whether attention experts have key and value maps of their own.

    Returns:
        The mixture.
    """
    experts = len(specialists) + 1
    return bam(
        specialists,
        options.plan(seed.model, experts),
        plan_attentions(seed.model, experts=experts, key_values=key_values, only=options.only or None),
        options.routers(experts),
        seed=seed.model,
        routing=AttentionRouting(std=0.02, seed=options.seed),
        expert_scale=options.scale(experts),
    )


def make_baseline(
    method: BaselineMethod,
    seed: LanguageModel,
    specialists: Sequence[nn.Module],
    options: MixOptions,
    *,
    experts: int = 4,
    domains: TokenDomains | None = None,
    owner: TextPhase | None = None,
    say: Callable[[str], None] | None = None,
) -> Upcycled:
    """Make a model to compare BAM with, before any joint training.

    Args:
        method: `sparse`, `drop` and `cluster` copy the seed; `btx` and `soup` take the seed and its specialists; `wide` is dense and as wide
            as the active experts; `continued` is the seed itself; `flexolmo` trains one expert per domain apart, and joins them with the
            seed's.
        seed: The dense model.
        specialists: Its specialists; unused by methods that need none.
        options: How FFNs are mixed, and which parts.
        experts: Number of experts of methods without specialists.
        domains: Tokens by domain, for `cluster` and `flexolmo`.
        owner: Training of one owner, for `flexolmo`.
        say: Gets lines about the training of the owners.

    Returns:
        The model.

    Raises:
        InvalidInput: The method needs specialists or texts, and there are none.
    """
    require(method in get_args(BaselineMethod), f"the baselines are {', '.join(get_args(BaselineMethod))}, found {method!r}")
    if method in ("btx", "soup") and not specialists:
        raise InvalidInput(f"{method} mixes specialists: give --specialists, or texts and --specialist-steps to train them")
    if method in ("cluster", "flexolmo") and domains is None:
        raise InvalidInput(f"{method} looks at texts: give --texts NAME=FILE ...")
    model = seed.model
    if method == "btx":
        count = len(specialists) + 1
        return btx(specialists, options.plan(model, count), options.routers(count), seed=model, expert_scale=options.scale(count))
    if method == "soup":
        return soup([model, *specialists])
    if method == "continued":
        return soup([model])
    if method == "wide":
        plan = options.plan(model, experts)  # stored as a bank of one wide expert
        return replace(wider_dense(model, plan, draw=options.seed), plan=replace(plan, experts=1, active=1))
    if method == "flexolmo":
        assert domains is not None
        return _flexolmo(model, domains, options, owner or TextPhase(steps=0), say)
    plan, rule = options.plan(model, experts), rule_of(options.ffn)
    if method == "cluster":
        assert domains is not None
        require(rule is not None, "cluster sends each token to its cluster, so --ffn soft does not fit; use top1 or top2")
        inputs = collect_inputs(model, plan, _reader(domains), most=4096, seed=options.seed)
        return cluster_aware(model, plan, inputs, rule, draw=options.seed)  # type: ignore[arg-type]
    if method == "drop":
        return drop_upcycling(model, plan, options.routers(experts), draw=options.seed)
    return sparse_copy(model, plan, options.routers(experts))


def expert_names(method: str, specialists: Sequence[str], texts: Sequence[str]) -> tuple[str, ...]:
    """Name the experts of a result, in order.

    Args:
        method: `bam` or a baseline.
        specialists: Names of the specialists.
        texts: Names of the texts.

    Returns:
        The names; none where experts are copies, which have only numbers, or where there are none.
    """
    others = {"bam": specialists, "btx": specialists, "flexolmo": texts}.get(method)
    if others is None:
        return ()
    return ("seed", *(f"{name} (specialist)" if name == "seed" else name for name in others))


def _reader(domains: TokenDomains) -> Callable[[nn.Module], None]:
    def run(model: nn.Module) -> None:
        length = min(256, longest_row(model), *(len(tokens) for tokens in domains.tokens.values()))
        for step in range(4):
            model(domains.batch(dict.fromkeys(domains.tokens, 1.0), count=8, length=length, seed=99, step=step))

    return run


def _flexolmo(
    model: nn.Module, domains: TokenDomains, options: MixOptions, phase: TextPhase, say: Callable[[str], None] | None
) -> Upcycled:
    rule = TopKRule(k=2, norm="renorm")
    plan = plan_replacement(model, experts=2, active=2, only=options.only or None)
    owners = []
    for number, name in enumerate(domains.tokens):
        made = sparse_copy(model, plan, RandomRouters(experts=2, rule=rule, seed=options.seed * 31 + number))
        held = freeze_for_owner(made.model)
        own = replace(phase, seed=phase.seed * 31 + number)
        tell = None if say is None else speaker(say, f"owner {name}")
        train_on(made.model, domains, {name: 1.0}, own, decay=0.0, say=tell)
        held.restore(made.model)
        owners.append(made.model)
    joined = join_mixtures(owners, rule)
    for parameter in joined.model.parameters():
        parameter.requires_grad_(True)
    return replace(joined, plan=replace(plan, experts=len(owners) + 1))


def write_model(
    folder: Path,
    made: Upcycled,
    source: LanguageModel,
    form: ModelFormat,
    *,
    layout: MixtralLayout = "per_expert",
    note: str = "",
    experts: Sequence[str] = (),
) -> str:
    """Write a model in the form that was asked for.

    Args:
        folder: The folder.
        made: The model.
        source: The dense model it was made of.
        form: Which form; `auto` writes a Mixtral where the model is one, else our own file.
        layout: Names of a Mixtral's tensors.
        note: How it was trained.
        experts: Names of the experts, in order; none where they have only numbers.

    Returns:
        One line about what was written.

    Raises:
        InvalidInput: The form was asked for, and the model does not fit it; or the folder is not empty.
        OSError: The folder cannot be written.
    """
    require_empty(folder)
    if made.plan is None and made.attentions is None and hasattr(made.model, "save_pretrained") and not moe_layers(made.model):
        write_dense(made.model, folder, source.folder)
        return f"{folder}: a dense Hugging Face model"
    reason = ""
    if form in ("auto", "mixtral"):
        try:
            saved = save_as_mixtral(made.model, folder, layout=layout, tokenizer_from=source.folder, experts=experts)
            names = f"; the names of its experts are in {EXPERTS_NAME}" if experts else ""
            return f"{folder}: a Hugging Face Mixtral, {len(saved.account.written)} tensors, read back bit by bit{names}"
        except InvalidInput as error:
            if form == "mixtral":
                raise
            reason = str(error)
    if made.plan is None:
        raise InvalidInput(
            f"the result cannot be stored as a mixture: it has no plan, and as a Mixtral it does not fit: {reason}"
        )
    with new_folder(folder) as work:
        said = save_language_mixture(work, made, source, note=note, experts=experts)
    return f"{folder}: {said}\n(no Mixtral: {reason})" if reason else f"{folder}: {said}"

"""Read-ME on a language model, from texts to a carved model with its pre-gate: measure, split, teach the gate, recover, compare.

Pooled static pruning of the same width is made beside it and gets the same recovery: it is the baseline that a carving must beat.
Read next: `served_models.py`, which writes the result as files to serve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, require_counts, require_numbers
from ..carving.activity import measure_activity
from ..carving.alternating import AlternatingConfig, AlternatingRecord, alternate
from ..carving.distillation import DistillLoss, OverlapConfig, measure_overlaps
from ..carving.masked_ffn import mask_ffns
from ..carving.pre_gate import PreGate, PreGateConfig, embedding_start
from ..carving.splits import pooled_units, readme_split
from ..carving.units import Carving
from ..language.language_models import LanguageModel
from ..language.text_scores import check_row, perplexity
from ..language.text_training import TokenDomains, next_token_loss
from ..layers.control_routers import given_routing
from ..surgery.replacement import plan_replacement


@dataclass(frozen=True, kw_only=True)
class LanguageCarving:
    """How a language model is carved."""

    ratio: float = 0.5
    """Share of each FFN's units that a token uses."""
    rows: int = 16
    """Rows of each text from which activity is measured."""
    gate_width: int = 128
    """Width of the pre-gate."""
    length: int = 256
    """Tokens per row."""
    batch: int = 4
    """Rows per step."""
    overlap: OverlapConfig = OverlapConfig(sharpness=100.0)
    """How the pre-gate is taught. Means over many FFNs differ by a few hundredths between experts, which a small sharpness hides."""
    training: AlternatingConfig = AlternatingConfig(rounds=1, router_steps=200, expert_steps=0, router_lr=5e-3)
    """Steps of the pre-gate and of the recovery. Without expert steps the weights stay the dense model's. The paper's rate of the router,
    5e-4, is for many more steps."""

    def __post_init__(self) -> None:
        require_numbers("LanguageCarving", least=1e-6, most=1.0, ratio=self.ratio)
        require_counts("LanguageCarving", rows=self.rows, gate_width=self.gate_width, batch=self.batch)
        require_counts("LanguageCarving", least=2, length=self.length)


class PreGatedModel(nn.Module):
    """A carved model that asks its pre-gate: `model(ids).logits`, as a dense one."""

    def __init__(self, model: nn.Module, gate: PreGate) -> None:
        super().__init__()
        self.model, self.gate = model, gate
        self.config: Any = getattr(model, "config", None)

    def forward(self, ids: Tensor) -> Any:
        """Decide, and compute.

        Args:
            ids: (B, L) tokens.

        Returns:
            What the model returns.
        """
        with given_routing(self.model, self.gate.decide(ids)):
            return self.model(ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class CarvedLanguage:
    """A carved language model, and pooled pruning of the same width."""

    model: nn.Module
    """The masked model."""
    carving: Carving
    """The units of each FFN."""
    gate: PreGate
    """The pre-gate."""
    pooled: nn.Module
    """The masked model of pooled pruning."""
    record: AlternatingRecord
    """What the training did."""

    def perplexities(
        self, dense: nn.Module, tests: Mapping[str, Tensor], *, length: int | None = None
    ) -> dict[str, dict[str, float]]:
        """Score all on texts.

        Args:
            dense: The dense model.
            tests: (T,) tokens of each domain.
            length: Tokens per row; None for what `perplexity` takes.

        Returns:
            For each domain the perplexity of `dense`, `pooled` and `carved`.
        """
        arms = {"dense": dense, "pooled": self.pooled, "carved": PreGatedModel(self.model, self.gate).eval()}
        return {
            domain: {name: perplexity(model, tokens, length=length) for name, model in arms.items()}
            for domain, tokens in tests.items()
        }


def carve_language(
    source: LanguageModel, texts: TokenDomains, config: LanguageCarving, *, say: Callable[[str], None] = lambda text: None
) -> CarvedLanguage:
    """Carve a language model into an expert for each text.

    Args:
        source: The dense model. It is not changed.
        texts: Tokens of each domain.
        config: How it is carved.
        say: Is told what was found.

    Returns:
        The carved model.

    Raises:
        InvalidInput: There are fewer than two texts, a text is shorter than a row, or a row is longer than the model reads.
    """
    names = list(texts.tokens)
    if len(names) < 2:
        raise InvalidInput(f"experts for domains need two texts or more, found {names}; give --texts NAME=FILE ...")
    check_row(source.model, config.length)
    short = [name for name, tokens in texts.tokens.items() if len(tokens) < config.length]
    if short:
        raise InvalidInput(f"the text {short[0]!r} fills no row of {config.length} tokens; lower --length or give more text")
    plan = plan_replacement(source.model, experts=len(names), active=1)
    rows = {name: _rows(tokens, config) for name, tokens in texts.tokens.items()}
    activity = measure_activity(source.model, plan, rows, _run_layers)
    say(str(activity))
    carving, seed = readme_split(activity, config.ratio), config.training.seed
    say(str(carving))
    embedding: Any = source.model.get_submodule("model.embed_tokens").weight  # type: ignore[union-attr]
    sizes = PreGateConfig(vocabulary=len(embedding), experts=len(names), width=config.gate_width)
    gate = sizes.build(seed, embedding=embedding_start(embedding, sizes.width))
    model, pooled = mask_ffns(source.model, carving), mask_ffns(source.model, pooled_units(activity, config.ratio))
    shares = dict.fromkeys(names, 1.0)

    def batch_of(kind: str, step: int) -> Tensor:
        offset = 0 if kind == "router" else 1_000_003
        return texts.batch(shares, count=config.batch, length=config.length, seed=seed + offset, step=step)

    def gate_loss(ids: Tensor) -> Tensor:
        overlaps = measure_overlaps(model, carving, lambda m: _run_layers(m, ids), config.overlap)
        return DistillLoss()(gate(ids).logits.flatten(0, 1), overlaps.targets())

    def text_loss(m: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda ids: next_token_loss(m(ids).logits, ids)

    record = alternate(model, [gate], config.training, batch_of, gate_loss, text_loss(PreGatedModel(model, gate)), say=say)
    if config.training.expert_steps:
        equal = replace(config.training, router_steps=0)
        alternate(pooled, [], equal, batch_of, gate_loss, text_loss(pooled), say=lambda text: say(f"pooled: {text}"))
    return CarvedLanguage(model=model, carving=carving, gate=gate, pooled=pooled, record=record)


def _run_layers(model: nn.Module, ids: Tensor) -> object:
    """Run the layers of a Llama without its output, which no FFN needs."""
    return model.get_submodule("model")(ids)


def _rows(tokens: Tensor, config: LanguageCarving) -> list[Tensor]:
    """Rows of a text, spread over it."""
    count = max(1, min(config.rows, len(tokens) // config.length))
    starts = torch.linspace(0, len(tokens) - config.length, count).long()
    return [tokens[start : start + config.length][None] for start in starts]

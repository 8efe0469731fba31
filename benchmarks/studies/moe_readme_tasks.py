"""Not a script: the two models that `moe_readme.py` carves, with their texts.

| name | model | domains |
|---|---|---|
| `smollm2` | SmolLM2-135M-Instruct, 30 gated FFNs of 1,536 units | scripture, code, law, formal mathematics (`moe_texts.py`) |
| `tiny` | a decoder of bytes that is trained first, 4 gated FFNs of 256 units | prose, Python, C++, sympy (`moe_bam_tiny.py`) |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from moe_bam_tiny import DOMAINS as TINY_DOMAINS
from moe_bam_tiny import split
from moe_texts import DOMAINS, smollm2_folder, split_texts, token_rows
from torch import Tensor, nn

from upcycle3d.perception.moe.language.small_lm import SmallLmConfig
from upcycle3d.perception.moe.language.text_training import TextTraining, TokenDomains, next_token_loss, train_phase
from upcycle3d.perception.moe.layers.precision import Precision

ModelName = Literal["smollm2", "tiny"]
TEXT_ROWS = 256
"""Rows of each domain that SmolLM2 is calibrated and tuned on."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers that decide every result of the study, besides the seed."""

    calibration: int
    """Rows of each domain from which activity is measured."""
    length: int
    """Tokens of a row of calibration and of tests."""
    tests: int
    """Rows of each domain to test on."""
    batch: int
    """Rows of a training step; a multiple of the number of domains, which are equally frequent."""
    train_length: int
    """Tokens of a row of training."""
    rounds: int
    """Rounds of alternating training."""
    router_steps: int
    """Router steps of a round."""
    expert_steps: int
    """Expert steps of a round."""
    router_lr: float
    """Learning rate of the routers."""
    expert_lr: float
    """Learning rate of everything else."""
    gate_width: int
    """Width of the pre-gate."""
    parent_steps: int
    """Steps that train the tiny model before it is carved; SmolLM2 is trained."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CarvingTask:
    """A dense model and its texts."""

    domains: tuple[str, ...]
    """Names of the domains."""
    dense: nn.Module
    """The model. Its embedding and output stay frozen in every arm; everything else may train."""
    embedding: Tensor
    """(V, D) its embedding."""
    body: Callable[[nn.Module, Tensor], object]
    """Runs all FFNs of such a model on rows, and leaves out what follows them where it can."""
    train: TokenDomains
    """Tokens to calibrate and train on."""
    tests: tuple[Tensor, ...]
    """(N, L) rows of each domain, from other documents."""
    precision: Precision
    """Type of the matrix products in training and tests."""


def task_of(model: ModelName, sizes: Sizes, folder: Path, seed: int) -> CarvingTask:
    """Make the task of a seed. SmolLM2 and its texts do not depend on it."""
    return _smollm2(sizes, folder) if model == "smollm2" else _tiny(sizes, seed)


@cache
def _smollm2(sizes: Sizes, folder: Path) -> CarvingTask:
    from transformers import AutoTokenizer, LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(smollm2_folder(folder), dtype=torch.float32).eval()
    tokenizer, texts = AutoTokenizer.from_pretrained(smollm2_folder(folder)), split_texts(folder)
    train = {d: token_rows(tokenizer, texts[d]["train"], TEXT_ROWS, sizes.length, seed=0).flatten() for d in DOMAINS}
    tests = tuple(token_rows(tokenizer, texts[d]["test"], sizes.tests, sizes.length, seed=0) for d in DOMAINS)
    embedding = model.get_input_embeddings().weight.requires_grad_(False)
    return CarvingTask(
        domains=DOMAINS,
        dense=model,
        embedding=embedding,
        body=lambda m, ids: m.model(ids),  # type: ignore[operator]
        train=TokenDomains(train),
        tests=tests,
        precision="bfloat16",
    )


@cache
def _bytes() -> dict[str, tuple[Tensor, Tensor]]:
    return {domain: split(domain) for domain in TINY_DOMAINS}


def text_digests(model: ModelName) -> dict[str, str]:
    """SHA-256 of the texts that depend on the machine; those of SmolLM2 come from pinned packages, but for its code."""
    texts = _bytes() if model == "tiny" else {}
    return {d: hashlib.sha256(a.numpy().tobytes() + b.numpy().tobytes()).hexdigest() for d, (a, b) in texts.items()}


@cache
def _tiny(sizes: Sizes, seed: int) -> CarvingTask:
    texts = _bytes()
    train = TokenDomains({name: tokens for name, (tokens, _) in texts.items()})
    model = SmallLmConfig(width=64, hidden=256, layers=4, heads=4, kv_heads=4, layout="sequential").build(seed)
    config = TextTraining(steps=sizes.parent_steps, lr=3e-3, warmup=20)
    shares = dict.fromkeys(TINY_DOMAINS, 1.0)

    def batch(step: int) -> Tensor:
        return train.batch(shares, count=8, length=sizes.length, seed=seed * 31 + 3, step=step)

    train_phase(model, batch, lambda m, ids: next_token_loss(m(ids).logits, ids), config)
    model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    tests = []
    for _, held in texts.values():
        starts = torch.linspace(0, len(held) - sizes.length, sizes.tests).long()
        tests.append(torch.stack([held[start : start + sizes.length] for start in starts]))
    return CarvingTask(
        domains=TINY_DOMAINS,
        dense=model.eval(),
        embedding=model.embed_tokens.weight,
        body=lambda m, ids: m(ids),
        train=train,
        tests=tuple(tests),
        precision="float32",
    )

"""BAM on a real model: the top 6 of SmolLM2-135M's 30 layers, branched into code, law and mathematics, mixed with every baseline.

    python benchmarks/studies/moe_smollm.py --out runs/moe_smollm --csv docs/experiments/moe_smollm/results.csv

SmolLM2 is a Llama (width 576, 9 heads, 3 key heads, gated FFN of 1,536), so its blocks are *sequential*; the paper's are parallel. The states
after layer 24 are computed once for every text and kept in 16 bits; the six layers above train on them. The last norm and the output
matrix are frozen, and the output is limited to the 8,192 most frequent tokens of the training texts: other tokens are not predicted, so
the perplexities are not those of the whole vocabulary. The weights are an instruct model's, read from a 4-bit file.

The branches are trained on code, law and formal mathematics with a tenth of scripture (King James Version) mixed in; the seed is kept as an
expert. Then every arm of `moe_arms.py` is trained on a quarter of each domain. Test documents are other documents. Five seeds decide the
branches, the routers and all batches. It needs `transformers`, `gguf` and `accelerate`; weights and texts come by `moe_assets.py`.

Written down before the run:

* Direction. From the papers: BAM below BTX top-1 by 2 to 10 %; own keys better than shared ones; BTX soft takes most of that gain. From a
  first look with one branch: a top-1 FFN without correction of its weight begins about 1 nat worse than the seed, so `btx_top1` and `bam`
  need more steps than there are to recover, and the corrected arms win.
* Falsifier. At equal seconds no arm of BAM is below `btx_soft`: the 95 % interval of the paired difference over five seeds reaches zero
  or lies above it.
* Controls. `btx_random_router` (choice without learning), `dense_all_compute` (the branches' compute in one dense model), `soup`, `ensemble`,
  `specialist_oracle`, and `flexolmo` (experts trained apart against the frozen seed, joined without joint training).

All compute is counted: `mix_cpu_seconds` and `branch_cpu_seconds` of every row. `--estimate` prints what the study will cost on this machine
from the measured cost of one step of each arm.
"""

from __future__ import annotations

import argparse
import collections
import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from moe_arms import ARMS, REFERENCE, UNTRAINED, Branches, Budget, Task
from moe_assets import default_cache
from moe_cells import Study, run_study
from moe_texts import DOMAINS, smollm2_folder, split_texts, token_rows
from torch import Tensor, nn

from upcycle3d.core.tensor_file import read_tensors, write_tensors
from upcycle3d.perception.moe.language.text_training import draw_rows

BELOW, LENGTH, VOCABULARY, TESTS = 24, 512, 8192, 12
LEFT_OUT = ("bam_attention_top1", "bam_attention_top2")  # they cost as much as `bam`, and the tiny study has them


class TopLayers(nn.Module):
    """The upper layers of a Llama, on states of the layers below: (B, L, D) in and out."""

    def __init__(self, layers: nn.ModuleList, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.layers = layers
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """Compute the layers.

        Args:
            states: (B, L, D) states of the layers below.

        Returns:
            (B, L, D) states before the last norm.
        """
        positions = (self.cos[:, : states.shape[1]], self.sin[:, : states.shape[1]])  # type: ignore[index]
        for layer in self.layers:
            out = layer(states, position_embeddings=positions, attention_mask=None)
            states = out[0] if isinstance(out, tuple) else out
        return states


@dataclass(frozen=True, kw_only=True)
class States:
    """Rows of one domain: states below the trained layers, and the tokens that follow."""

    states: Tensor
    """(N, L, D) in 16 bits."""
    targets: Tensor
    """(N, L) int64 next token by its rank, -100 where it is not predicted."""


class SmolTask(Task):
    """The trained layers of SmolLM2 on kept states."""

    domains, specialties, precision = DOMAINS, DOMAINS[1:], "bfloat16"

    def __init__(self, cache: Path, rows: int, batch: int) -> None:
        self.rows, self.batch_rows = rows, batch
        self._load(cache)

    def _load(self, cache: Path) -> None:
        from transformers import AutoTokenizer, LlamaForCausalLM

        folder = smollm2_folder(cache)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        path = cache / f"moe_smollm_{self.rows}x{LENGTH}.safetensors"
        if not path.exists():
            start = time.process_time()
            write_tensors(path, kept_states(model, AutoTokenizer.from_pretrained(folder), split_texts(cache), self.rows))
            print(f"states of {path} took {time.process_time() - start:.0f} CPU-s", flush=True)
        kept = read_tensors(path).tensors
        self.train = {d: States(states=kept[f"{d}.train.states"], targets=kept[f"{d}.train.targets"]) for d in DOMAINS}
        self.test = {d: States(states=kept[f"{d}.test.states"], targets=kept[f"{d}.test.targets"]) for d in DOMAINS}
        cos, sin = model.model.rotary_emb(torch.zeros(1, LENGTH, model.config.hidden_size), torch.arange(LENGTH)[None])
        self.seed = TopLayers(nn.ModuleList(model.model.layers[BELOW:]), cos, sin).eval()
        self.norm = copy.deepcopy(model.model.norm).requires_grad_(False)
        self.head = model.lm_head.weight.detach()[kept["vocabulary"]].clone()

    def seed_model(self, seed: int) -> nn.Module:
        return copy.deepcopy(self.seed)

    def batch(self, shares: Mapping[str, float], seed: int, step: int) -> States:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        names = list(shares)
        states, targets = [], []
        for domain in draw_rows(shares, self.batch_rows, draw):
            part = self.train[names[domain]]
            row = int(torch.randint(0, len(part.states), (1,), generator=draw))
            states.append(part.states[row])
            targets.append(part.targets[row])
        return States(states=torch.stack(states), targets=torch.stack(targets))

    def log_probabilities(self, model: nn.Module, batch: States) -> tuple[Tensor, Tensor]:
        out = self.norm(model(batch.states.float()))
        kept = batch.targets >= 0
        return out[kept] @ self.head.T, batch.targets[kept]

    def loss(self, model: nn.Module, batch: States) -> Tensor:
        logits, targets = self.log_probabilities(model, batch)
        return F.cross_entropy(logits.float(), targets)

    def tests(self, domain: str) -> Sequence[States]:
        part = self.test[domain]
        pairs = zip(part.states.split(2), part.targets.split(2))
        return [States(states=states, targets=targets) for states, targets in pairs]


@torch.no_grad()
def kept_states(model: Any, tokenizer: Any, texts: Mapping[str, Mapping[str, list[str]]], rows: int) -> dict[str, Tensor]:
    """Compute the states below the trained layers for all rows of all domains, and choose the vocabulary."""
    found: dict[str, Tensor] = {}
    tokens = {
        (domain, part): token_rows(tokenizer, texts[domain][part], rows if part == "train" else TESTS, LENGTH + 1, seed=0)
        for domain in DOMAINS
        for part in ("train", "test")
    }
    counts: collections.Counter[int] = collections.Counter()
    for domain in DOMAINS:
        counts.update(tokens[domain, "train"].flatten().tolist())
    vocabulary = torch.tensor(sorted(token for token, _ in counts.most_common(VOCABULARY)))
    rank = torch.full((model.config.vocab_size,), -100)
    rank[vocabulary] = torch.arange(len(vocabulary))
    found["vocabulary"] = vocabulary
    for (domain, part), ids in tokens.items():
        states = []
        for some in ids[:, :-1].split(4):
            x = model.model.embed_tokens(some)
            positions = model.model.rotary_emb(x, torch.arange(LENGTH)[None])
            with torch.autocast("cpu", torch.bfloat16):
                for layer in model.model.layers[:BELOW]:
                    out = layer(x, position_embeddings=positions, attention_mask=None)
                    x = out[0] if isinstance(out, tuple) else out
            states.append(x.half())
        found[f"{domain}.{part}.states"] = torch.cat(states)
        found[f"{domain}.{part}.targets"] = rank[ids[:, 1:]]
        if not found[f"{domain}.{part}.states"].isfinite().all():
            raise SystemExit(f"error: the states of {domain} do not fit into 16 bits")
    return found


def estimate(costs: Mapping[str, float], budget: Budget, arms: Sequence[str], seeds: int) -> str:
    """Say what the study will cost, from the measured CPU seconds of one step of each arm."""
    steps, mixed = budget.mix_steps, {arm: cost for arm, cost in costs.items() if arm in arms}
    branch = 3 * budget.branch_steps * costs["dense"]
    mixing = sum(max(steps, min(steps * costs[REFERENCE] / cost, budget.longest * steps)) * cost for cost in mixed.values())
    mixing += branch if "dense_all_compute" in arms else 0
    owners = 3 * budget.branch_steps * costs["btx_top2"] if "flexolmo" in arms else 0
    forward = 4 * TESTS / 2 / 3  # batches of all domains, each a third of a training step
    tests = forward * (2.25 * sum(mixed.values()) + 12 * costs["dense"])
    total = branch + mixing + owners + tests
    each = ", ".join(f"{arm} {cost:.2f}" for arm, cost in costs.items())
    return (
        f"CPU-s per step: {each}\none seed: about {total:,.0f} CPU-s; {seeds} seeds: {seeds * total / 3600:.1f} h on one thread"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--csv", type=Path, help="the table; OUT/results.csv by default")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of weights, texts and states")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    usual = [arm for arm in (*UNTRAINED, *ARMS) if arm not in LEFT_OUT]
    parser.add_argument("--arms", nargs="+", default=usual, choices=[*UNTRAINED, *ARMS])
    parser.add_argument("--rows", type=int, default=256, help="rows of 512 tokens to train on per domain")
    parser.add_argument("--branch-steps", type=int, default=80)
    parser.add_argument("--mix-steps", type=int, default=80)
    parser.add_argument("--estimate", action="store_true", help="measure one step of each arm, print the cost and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    budget = Budget(branch_steps=arguments.branch_steps, mix_steps=arguments.mix_steps, branch_lr=3e-4, mix_lr=3e-4, longest=3.0)
    study = Study(
        arguments.out, lambda: SmolTask(arguments.cache, arguments.rows, 2), budget, {"rows": arguments.rows}, cost_steps=1
    )
    if arguments.estimate:
        seed = study.task.seed_model(0)
        alike = Branches(seed=seed, specialists=tuple(copy.deepcopy(seed) for _ in range(3)), number=0)
        print(estimate(study.costs(alike), budget, arguments.arms, len(arguments.seeds)))
        return
    run_study(study, arguments.seeds, arguments.arms, arguments.csv or arguments.out / "results.csv", DOMAINS)


if __name__ == "__main__":
    main()

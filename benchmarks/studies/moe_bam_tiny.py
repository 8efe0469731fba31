"""BAM from scratch on a tiny decoder with parallel attention: does mixing attentions bring more than mixing FFNs softly?

    python benchmarks/studies/moe_bam_tiny.py --out runs/moe_bam_tiny --csv docs/experiments/moe_bam_tiny/results.csv

A decoder of bytes (2 blocks, width 64, parallel attention as in the paper) is trained on prose with a tenth of each other domain. It is
branched into Python, C++ and mathematics (sympy's sources), each with a tenth of prose mixed in. Then every arm of `moe_arms.py` is
trained on a quarter of each domain. The texts lie on every machine with Python and torch; their SHA-256 goes into the settings. The test
documents are other files than those that are trained on. Five seeds, which decide the first weights, the branches and all batches.

Written down before the run, from the papers:

* Direction. BAM with its own keys is 2 to 10 % below BTX top-1 in perplexity, and better than BAM with shared keys. Sparse weights of
  attentions (top-1, top-2) are no better than BTX. BTX soft takes most of the gain over BTX top-1; attention experts add a little.
* Falsifier. At equal seconds `bam`, `bam_scaled` and `bam_soft_ffn` are not below `btx_soft`: the 95 % interval of the paired difference
  over five seeds reaches zero or lies above it. Then attention experts are not worth their compute here.
* Controls. If `btx_random_router` ties `btx_top2`, the learned choice of experts does nothing. If `dense_all_compute`, which gets the
  compute of the branches too, ties BAM, then branching is not worth it at this size.

All compute is counted: `mix_cpu_seconds` and `branch_cpu_seconds` of every row. The whole study takes about 12 CPU-minutes on one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from moe_arms import ARMS, UNTRAINED, Budget, Task
from moe_cells import Study, run_study
from torch import Tensor, nn

from upcycle3d.perception.moe.language.small_lm import SmallLmConfig
from upcycle3d.perception.moe.language.text_training import TextTraining, TokenDomains, next_token_loss, train_phase

DOMAINS = ("prose", "python", "cpp", "math")
ROWS, LENGTH, TESTS = 8, 128, 32
MOST = 4_000_000  # bytes of a domain


def documents(domain: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of every document of a domain, in a fixed order."""
    stdlib, packages = Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent.parent
    if domain == "python":
        skipped = ("site-packages", "/test", "idlelib", "pydoc_data", "/encodings/", "dist-packages")
        files = [f for f in sorted(stdlib.rglob("*.py")) if not any(s in str(f) for s in skipped)]
    elif domain == "cpp":
        files = sorted((packages / "torch" / "include").rglob("*.h"))
    elif domain == "math":
        files = [f for f in sorted((packages / "sympy").rglob("*.py")) if "/tests/" not in str(f)]
    else:
        from pydoc_data.topics import topics

        yield from sorted(topics.items())
        files = sorted(f for f in packages.glob("*.dist-info/**/*") if f.is_file() and "LICEN" in f.name.upper())
    seen: set[str] = set()
    for file in files:
        text = file.read_text(errors="ignore")
        digest = hashlib.sha256(text.encode()).hexdigest()
        if len(text) > 500 and digest not in seen:
            seen.add(digest)
            yield str(file.relative_to(file.parents[1])), text


def split(domain: str) -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes to test, from different documents."""
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for name, text in documents(domain):
        parts[int(hashlib.md5(name.encode()).hexdigest(), 16) % 10 == 0].append(text.encode()[:60_000])
    train, test = (b"\n".join(parts[held])[:MOST] for held in (False, True))
    return tuple(torch.frombuffer(bytearray(data), dtype=torch.uint8).long() for data in (train, test))  # type: ignore[return-value]


class TinyTask(Task):
    """Bytes of four domains and a tiny decoder."""

    domains, specialties, precision = DOMAINS, DOMAINS[1:], "float32"

    def __init__(self, texts: Mapping[str, tuple[Tensor, Tensor]], seed_steps: int) -> None:
        self.train = TokenDomains({name: train for name, (train, _) in texts.items()})
        self.seed_steps = seed_steps
        self.rows: dict[str, list[Tensor]] = {}
        for name, (_, test) in texts.items():
            starts = torch.linspace(0, len(test) - LENGTH, TESTS).long()
            self.rows[name] = list(torch.stack([test[s : s + LENGTH] for s in starts]).split(ROWS))

    def seed_model(self, seed: int) -> nn.Module:
        model = SmallLmConfig(width=64, hidden=128, layers=2, heads=4, kv_heads=4, layout="parallel").build(seed)
        shares = {"prose": 0.7, "python": 0.1, "cpp": 0.1, "math": 0.1}
        config = TextTraining(steps=self.seed_steps, lr=3e-3, warmup=20)
        train_phase(model, lambda step: self.batch(shares, seed * 31 + 3, step), self.loss, config)
        return model

    def batch(self, shares: Mapping[str, float], seed: int, step: int) -> Tensor:
        return self.train.batch(shares, count=ROWS, length=LENGTH, seed=seed, step=step)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return next_token_loss(model(batch).logits, batch)

    def log_probabilities(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        return model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()

    def tests(self, domain: str) -> Sequence[Tensor]:
        return self.rows[domain]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--csv", type=Path, help="the table; OUT/results.csv by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=[*UNTRAINED, *ARMS], choices=[*UNTRAINED, *ARMS])
    parser.add_argument("--seed-steps", type=int, default=500)
    parser.add_argument("--branch-steps", type=int, default=80)
    parser.add_argument("--mix-steps", type=int, default=80)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    texts = {domain: split(domain) for domain in DOMAINS}
    digests = {d: hashlib.sha256(a.numpy().tobytes() + b.numpy().tobytes()).hexdigest() for d, (a, b) in texts.items()}
    budget = Budget(
        branch_steps=arguments.branch_steps, mix_steps=arguments.mix_steps, branch_lr=1.5e-3, mix_lr=1.5e-3, longest=3.0
    )
    made = TinyTask(texts, arguments.seed_steps)
    study = Study(arguments.out, lambda: made, budget, {"texts": digests, "seed_steps": arguments.seed_steps}, cost_steps=3)
    run_study(study, arguments.seeds, arguments.arms, arguments.csv or arguments.out / "results.csv", DOMAINS)


if __name__ == "__main__":
    main()

"""Diversified multiplet upcycling (DMU) of two real pre-trained encoders: DINOv2-small and MiniLM, aligned on emoji in two drawing styles.

    python benchmarks/studies/moe_emoji.py OUT --cache DIR [--seeds 0 1 2 3 4]

The last 4 of 12 picture blocks and the last 3 of 6 text blocks train, with projections to 256 numbers; the others are frozen and their
outputs are stored once. The base is trained once (400 steps) and is the same for all seeds; a seed decides clusters, batches and
routers. Pictures in the styles of Noto and Twemoji train; the test has other stems of names, in these styles and, as a second test, in
the style of Fluent flat. `moe_emoji_data.py` says how pictures and names are joined and split, `moe_dmu_arms.py` explains the arms.

Written before the first run:

- The paper's claim: the mixture of stages on cluster-pure batches retrieves better than direct fine-tuning and than sparse upcycling.
- A first look with one seed, a base of 44 steps and 20 steps per arm was against it: ordinary batches raised R@1 from 11.3 to 15.6 %,
  cluster-pure batches left it at 11.3 %. So a single expert of a cluster stage is expected to be *worse* than one of ordinary batches
  (`dmu: expert 1` below `plain: expert 1`); only the mixture can justify the method.
- Expected, if the paper's direction holds: R@1 both ways of `dmu` above `dense all`, `dense ffn`, `sparse` and `plain`, each by more than
  the 95 % interval of the paired difference over 5 seeds, and skin tone and gender (the factors that clusters must leave open) gain most.
- Falsified here if `plain` (un-clustered experts) or `dmu: random router` ties or wins, that is if the interval of the paired difference
  from it includes 0 or lies below it.

Measures: recall at 1 and 5, pictures among the test captions and captions among the test pictures; the right one among captions of one
emoji in five skin tones (chance 20 %), among man, woman and person (chance 33 to 50 %), the right one of ten groups, the right flag among
test flags; and a picture's twin in the other style (style). Nothing is chosen on the test: rates and steps are those of the first look.
Results are kept arm by arm, so the command may be stopped and given again.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from moe_assets import default_cache
from moe_dmu_arms import Budget, Metrics, SeedRun, World, keep_options, print_tables, with_rows_of_others, write_csv
from moe_emoji_data import STYLES, EmojiPairs, emoji_pairs
from moe_towers import FROZEN, WIDTH, DinoTail, MiniLmTail, dino_weights, minilm_weights, tail_of
from torch import Tensor, nn

from upcycle3d.core.provenance import provenance_of_process
from upcycle3d.core.tensor_file import TensorFileKind, fill_module, read_tensors, write_tensors
from upcycle3d.perception.moe.contrastive.loss import LogitScale
from upcycle3d.perception.moe.contrastive.pair_training import PairEmbeddings, PairTraining, encode_pairs, recall, train_pairs
from upcycle3d.perception.moe.contrastive.pairs import PairTowers, TwoTowers
from upcycle3d.perception.moe.contrastive.stages import MixtureParts
from upcycle3d.tools.console import write_json

BASE = TensorFileKind(
    name="base of the study", format="upcycle3d study base 1", advice="delete it, and the study trains it again"
)
FLAGS = 9
"""Unicode's group of flags."""


def fresh_towers(cache: Path) -> TwoTowers:
    """The pre-trained blocks that train, with new projections."""
    torch.manual_seed(0)
    image, text = DinoTail(), MiniLmTail()
    for module, weights, name in ((image, dino_weights(cache), "dinov2"), (text, minilm_weights(cache), "minilm")):
        kept = module.state_dict().keys()
        tail = {key: tensor for key, tensor in tail_of(weights, FROZEN[name]).items() if key in kept}
        fill_module(module, tail, name)
    projections = nn.Linear(2 * WIDTH, 256, bias=False), nn.Linear(WIDTH, 256, bias=False)
    return TwoTowers(image, text, *projections, logit_scale=LogitScale(1 / 0.07, learned=True))


def trained_base(out: Path, cache: Path, found: EmojiPairs, training: PairTraining) -> tuple[TwoTowers, float]:
    """Train the base, or read it where that was done; the CPU seconds of the training come with it."""
    path = out / f"base_{training.steps}_steps.safetensors"
    towers = fresh_towers(cache)
    if path.exists():
        file = read_tensors(path, BASE)
        fill_module(towers, file.tensors, path)
        return towers, float(file.meta["cpu_seconds"])
    data = found.pairs(found.rows(test=False, styles=STYLES[:2]))
    children = tuple(name for name, child in towers.named_children() if any(True for _ in child.parameters()))

    def say(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"base: step {step} of {training.steps}, loss {loss:.3f}", flush=True)

    ordinary = torch.zeros(len(data), dtype=torch.int64)
    report = train_pairs(towers, data, ordinary, training, "ffn", MixtureParts(ffn=children), seed=0, on_step=say)
    print(f"base: {report}", flush=True)
    write_tensors(path, towers.state_dict(), {"cpu_seconds": str(report.cpu_seconds)}, BASE)
    return towers, report.cpu_seconds


class Test:
    """Measures a model on the test stems, in one set of styles after the other."""

    def __init__(self, found: EmojiPairs, precision: str, most: int | None = None) -> None:
        self.found, self.precision = found, precision
        self.rows = [found.rows(test=True, styles=styles)[:most] for styles in (STYLES[:2], STYLES[2:])]

    def __call__(self, towers: PairTowers) -> Metrics:
        out: dict[str, float] = {}
        for rows, suffix in zip(self.rows, ("", " (third style)")):
            data = self.found.pairs(rows)
            embedded = encode_pairs(towers, data, precision=self.precision)  # type: ignore[arg-type]
            scores = recall(embedded, data.caption)
            for way, shares in (("image to text", scores.image_to_text), ("text to image", scores.text_to_image)):
                out |= {f"R@{k} {way}{suffix}": share for k, share in shares.items()}
            out |= {f"{name}{suffix}": share for name, share in self.factors(embedded, data.caption).items()}
            if not suffix:
                out["style"] = self.twins(embedded.image, rows)
        return out

    def factors(self, embedded: PairEmbeddings, caption: Tensor) -> dict[str, float]:
        """Minimal pairs of skin tone and gender, the group of the nearest caption, and the flag among flags."""
        captions, which = caption.unique(return_inverse=True)
        first = {int(c): i for i, c in reversed(list(enumerate(which.tolist())))}
        words = embedded.text[[first[c] for c in range(len(captions))]]
        similar = embedded.image @ words.T
        emoji = [self.found.emoji[int(c)] for c in captions]
        sets: dict[str, dict[tuple[str, int], list[int]]] = {"tone": defaultdict(list), "gender": defaultdict(list)}
        for c, e in enumerate(emoji):
            if e.tone >= 1:
                sets["tone"][e.base, 0].append(c)
            if e.tone >= 0 and e.group == 1:
                sets["gender"][e.stem, e.tone].append(c)
        out = {}
        for name, found in sets.items():
            hits = []
            for choices in found.values():
                if not 2 <= len(choices) <= (5 if name == "tone" else 3):
                    continue
                mine = torch.isin(which, torch.tensor(choices)).nonzero()[:, 0]
                best = torch.tensor(choices)[similar[mine][:, choices].argmax(1)]
                hits += (best == which[mine]).double().tolist()
            out[name] = sum(hits) / len(hits) if hits else float("nan")
        group = torch.tensor([e.group for e in emoji])
        out["category"] = float((group[similar.argmax(1)] == group[which]).double().mean())
        flags, mine = (group == FLAGS).nonzero()[:, 0], group[which] == FLAGS
        if len(flags) and mine.any():
            out["country"] = float((flags[similar[mine][:, flags].argmax(1)] == which[mine]).double().mean())
        return out

    def twins(self, image: Tensor, rows: Tensor) -> float:
        """Share of the pictures of the first style whose nearest picture of the second style is the same emoji."""
        caption, style = self.found.caption[rows], self.found.style[rows]
        one, two = ((style == i).nonzero()[:, 0] for i in (0, 1))
        one = one[torch.isin(caption[one], caption[two])]
        if not len(one):
            return float("nan")
        nearest = two[(image[one] @ image[two].T).argmax(1)]
        return float((caption[nearest] == caption[one]).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the study")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the assets and of the stored states")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--csv", type=Path, help="the table; OUT/results.csv by default. Seeds that it has already stay in it")
    parser.add_argument("--base-steps", type=int, default=400, help="steps of the base")
    parser.add_argument("--stage-steps", type=int, default=56, help="T, steps of one stage")
    parser.add_argument("--router-steps", type=int, default=28, help="R, steps of the routers")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate of base, stages and dense arms")
    parser.add_argument("--router-lr", type=float, default=1e-3, help="learning rate of the routers")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--most-test", type=int, help="pictures per test, for a quick look")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_options(
        arguments.out,
        {name: value for name, value in vars(arguments).items() if name not in ("out", "csv", "seeds", "cache", "threads")},
    )
    found = emoji_pairs(arguments.cache, partial(print, flush=True))
    size = arguments.batch_size
    stage = PairTraining(
        steps=arguments.stage_steps,
        batch_size=size,
        lr=arguments.lr,
        weight_decay=0.1,
        warmup=10,
        label_smoothing=0.0,
        precision=arguments.precision,
    )
    router = PairTraining(
        steps=arguments.router_steps,
        batch_size=size,
        lr=arguments.router_lr,
        weight_decay=0.01,
        warmup=5,
        label_smoothing=0.0,
        precision=arguments.precision,
    )
    base_training = PairTraining(
        steps=arguments.base_steps,
        batch_size=size,
        lr=arguments.lr,
        weight_decay=0.1,
        warmup=40,
        label_smoothing=0.0,
        precision=arguments.precision,
    )
    _print_estimate(arguments.base_steps, arguments.stage_steps, arguments.router_steps, size, len(arguments.seeds))
    base, seconds = trained_base(arguments.out, arguments.cache, found, base_training)
    world = World(
        base=base,
        base_seconds=seconds,
        data=found.pairs(found.rows(test=False, styles=STYLES[:2])),
        evaluate=Test(found, arguments.precision, arguments.most_test),
    )
    budget = Budget(stage=stage, router=router, full_lr=arguments.lr)
    table, results = arguments.csv or arguments.out / "results.csv", {}
    for seed in arguments.seeds:
        results[seed] = SeedRun(arguments.out, seed, budget, lambda: world).run()
        write_csv(table, with_rows_of_others(table, results))
    write_json(arguments.out / "environment.json", asdict(provenance_of_process()))
    shown = ("R@1 image to text", "R@1 text to image", "tone", "gender", "category", "style")
    print_tables(with_rows_of_others(table, results), shown, against=("dense all", "plain", "dmu: random router"))


def _print_estimate(base: int, stage: int, router: int, size: int, seeds: int) -> None:
    """Say what the run costs, from 1.1 CPU seconds per dense step of 128 pairs in bfloat16 on one machine."""
    per_step = 1.1 * size / 128
    long = 3 * stage + router
    seed = per_step * (5 * long + 2 * 1.5 * long) + 300
    total = per_step * base + seeds * seed
    print(f"estimate: base {per_step * base:.0f}, each seed {seed:.0f}, {seeds} seeds {total:.0f} CPU seconds in all", flush=True)


if __name__ == "__main__":
    main()

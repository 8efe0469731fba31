"""Does diversified multiplet upcycling (DMU) do what it claims? A tiny CLIP from scratch on drawn shapes with captions.

    python benchmarks/studies/moe_shapes.py OUT [--seeds 0 1 2 3 4]

A picture shows one shape with four factors: color (8), shape (6), texture (4) and position (4). Color fills most of the picture and is
easy, and so is position; shape and texture are not. Captions name all four. A quarter of the combinations never occurs in training and is the test.

Written before the first run:

- The paper's claim: stages on cluster-pure batches make experts that see what the base does not, and the mixture retrieves better than
  direct fine-tuning and than sparse upcycling.
- Expected direction, if it holds: R@1 both ways of `dmu` above `dense all`, `dense ffn`, `sparse` and `plain` by more than the 95 %
  interval of the paired difference; minimal pairs of texture and position gain most; color loses at most a little; the experts' best
  factors differ.
- The mechanism counts as falsified here if `plain` (un-clustered experts) or `dmu: random router` is as good as `dmu`, that is if the
  interval of the paired difference includes 0 or lies below it.

The size and contrast of the shapes were chosen with seed 7, by the base alone: it tells colors and positions (99 %), half of the shapes and
half of the textures. A first drawing with smaller shapes left all arms of that seed where the base was, because the shapes could hardly
be seen. Seeds 0 to 4 were not looked at.

Minimal pairs: of the captions that differ from the right one in a single factor only, with the right one among them, is the right one the
nearest? Chance is 1 / number of values. The arms are explained in `moe_dmu_arms.py`. Results are kept arm by arm, so the command may be
stopped and given again. To see at which budget a direction begins, give other `--stage-steps`, `--base-steps` or `--pictures`, each with
its own OUT.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from moe_dmu_arms import Budget, Metrics, SeedRun, World, keep_options, print_tables, write_csv
from moe_towers import PreNormBlock
from torch import Tensor, nn

from upcycle3d.core.provenance import provenance_of_process
from upcycle3d.perception.moe.contrastive.loss import LogitScale
from upcycle3d.perception.moe.contrastive.pair_training import PairEmbeddings, PairTraining, encode_pairs, recall, train_pairs
from upcycle3d.perception.moe.contrastive.pairs import PairTensors, PairTowers, TwoTowers
from upcycle3d.perception.moe.contrastive.stages import MixtureParts
from upcycle3d.tools.console import write_json

FACTORS = {"color": 8, "shape": 6, "texture": 4, "position": 4}
"""Number of values of each factor."""
COMBINATIONS = 8 * 6 * 4 * 4
PIXELS, PATCH, WIDTH = 24, 6, 48
COLORS = torch.tensor(
    [
        [0.9, 0.1, 0.1],
        [0.1, 0.8, 0.1],
        [0.1, 0.2, 0.9],
        [0.9, 0.9, 0.1],
        [0.9, 0.1, 0.9],
        [0.1, 0.9, 0.9],
        [0.9, 0.5, 0.1],
        [0.5] * 3,
    ]
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of the study."""

    pictures: int
    """Training pictures."""
    test_pictures: int
    """Test pictures."""
    base_steps: int
    """Steps of the base."""
    budget: Budget
    """Steps of the arms."""


def draw(combination: Tensor, seed: int) -> Tensor:
    """Draw pictures.

    Args:
        combination: (N,) int64 number of the combination of factors.
        seed: Decides the noise.

    Returns:
        (N, 3, 24, 24).
    """
    random = torch.Generator().manual_seed(seed)
    color, shape, texture, position = factors_of(combination).unbind(1)
    count = len(combination)
    line = torch.linspace(-1, 1, PIXELS)
    y, x = line.view(1, -1, 1), line.view(1, 1, -1)
    center = torch.tensor([[-0.4, -0.4], [-0.4, 0.4], [0.4, -0.4], [0.4, 0.4]])[position] + 0.12 * torch.randn(
        count, 2, generator=random
    )
    size = 0.52 + 0.04 * torch.randn(count, 1, 1, generator=random)
    dy, dx = (y - center[:, 0].view(-1, 1, 1)) / size, (x - center[:, 1].view(-1, 1, 1)) / size
    far, near = torch.maximum(dx.abs(), dy.abs()), dx.abs() + dy.abs()
    forms = torch.stack(
        [
            dx**2 + dy**2 < 1,  # disc
            far < 0.85,  # square
            near < 1.1,  # diamond
            (dx**2 + dy**2 < 1) & (dx**2 + dy**2 > 0.3),  # ring
            (torch.minimum(dx.abs(), dy.abs()) < 0.33) & (far < 1),  # cross
            (dy < 0.7) & (dy > 1.7 * dx.abs() - 1),  # triangle
        ]
    )
    inside = forms[shape, torch.arange(count)].float()
    phase = torch.rand(count, 1, 1, generator=random) * 6.28
    waves = torch.stack(
        [
            torch.ones(count, PIXELS, PIXELS),
            (14 * y + phase).sin() + 0 * x,
            (14 * x + phase).sin() + 0 * y,
            (14 * x + phase).sin() * (14 * y).sin(),
        ]
    )
    ink = inside * (0.65 + 0.35 * waves[texture, torch.arange(count)].sign())
    tint = (COLORS[color] + 0.06 * torch.randn(count, 3, generator=random)).view(-1, 3, 1, 1)
    picture = 0.4 * tint + 0.6 * ink[:, None] * (1 - tint)
    return picture + 0.05 * torch.randn(picture.shape, generator=random)


def factors_of(combination: Tensor) -> Tensor:
    """(N, 4) values of the factors of combinations."""
    out = []
    for count in reversed(FACTORS.values()):
        out.append(combination % count)
        combination = combination // count
    return torch.stack(out[::-1], dim=1)


def caption_ids(combination: Tensor) -> Tensor:
    """(N, 4) words: each factor has its own."""
    starts = torch.tensor([0, *torch.tensor(list(FACTORS.values())).cumsum(0)[:-1].tolist()])
    return factors_of(combination) + starts


class Pictures(nn.Module):
    """A small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.places = nn.Parameter(0.02 * torch.randn(1, (PIXELS // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(PreNormBlock(WIDTH, 4, 4 * WIDTH, layer_scale=False, eps=1e-5) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, picture: Tensor) -> Tensor:
        x = self.patch(picture).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x.mean(1))
        return out


class Words(nn.Module):
    """A small text transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(sum(FACTORS.values()), WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(1, len(FACTORS), WIDTH))
        self.blocks = nn.ModuleList(PreNormBlock(WIDTH, 4, 4 * WIDTH, layer_scale=False, eps=1e-5) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x.mean(1))
        return out


def pairs_of(combination: Tensor, seed: int) -> PairTensors:
    """Pictures and captions of combinations."""
    return PairTensors(image=draw(combination, seed), text=caption_ids(combination), caption=combination)


def make_world(seed: int, size: Size) -> World:
    """Draw one seed's data and train its base."""
    random = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(COMBINATIONS, generator=random)
    held_out, seen = order[: COMBINATIONS // 4], order[COMBINATIONS // 4 :]
    train = seen[torch.randint(len(seen), (size.pictures,), generator=random)]
    test = held_out[torch.randint(len(held_out), (size.test_pictures,), generator=random)]
    data = pairs_of(train, 10 * seed + 1)
    torch.manual_seed(seed)
    towers = TwoTowers(
        Pictures(),
        Words(),
        nn.Linear(WIDTH, 32, bias=False),
        nn.Linear(WIDTH, 32, bias=False),
        logit_scale=LogitScale(14.0, learned=True),
    )
    training = PairTraining(
        steps=size.base_steps, batch_size=size.budget.stage.batch_size, lr=2e-3, weight_decay=0.05, warmup=40, label_smoothing=0.0
    )
    parts = MixtureParts(ffn=tuple(name for name, child in towers.named_children() if any(True for _ in child.parameters())))
    report = train_pairs(towers, data, torch.zeros(len(data), dtype=torch.int64), training, "ffn", parts, seed=seed)
    evaluate = partial(measure, test=pairs_of(test, 10 * seed + 2), train=(data, train))
    return World(base=towers, base_seconds=report.cpu_seconds, data=data, evaluate=evaluate)


def measure(towers: PairTowers, test: PairTensors, train: tuple[PairTensors, Tensor]) -> Metrics:
    """Retrieval among unseen combinations, minimal pairs, and linear probes of the picture embeddings."""
    found = encode_pairs(towers, test)
    scores = recall(found, test.caption)
    every = torch.arange(COMBINATIONS)
    blank = PairTensors(image=test.image[:1].expand(COMBINATIONS, -1, -1, -1), text=caption_ids(every), caption=every)
    words = encode_pairs(towers, blank).text
    out = {
        "R@1 image to text": scores.image_to_text[1],
        "R@1 text to image": scores.text_to_image[1],
        "R@5 image to text": scores.image_to_text[5],
        "R@5 text to image": scores.text_to_image[5],
    }
    near = minimal_pairs(found.image, words, test.caption)
    sample = torch.arange(0, len(train[1]), 6)
    probe = encode_pairs(towers, PairTensors(image=train[0].image[sample], text=train[0].text[sample], caption=train[1][sample]))
    probed = linear_probe(probe, factors_of(train[1][sample]), found, factors_of(test.caption))
    return {**out, **{f"pairs {k}": v for k, v in near.items()}, **{f"probe {k}": v for k, v in probed.items()}}


def minimal_pairs(image: Tensor, words: Tensor, combination: Tensor) -> dict[str, float]:
    """Share of pictures that are nearest to their own caption among those that differ in one factor."""
    values = factors_of(combination)
    step = COMBINATIONS
    out = {}
    for place, (name, count) in enumerate(FACTORS.items()):
        step //= count
        others = combination[:, None] + step * (torch.arange(count) - values[:, place : place + 1])
        similar = torch.einsum("nd,ncd->nc", image, words[others])
        out[name] = float((similar.argmax(1) == values[:, place]).double().mean())
    return out


def linear_probe(train: PairEmbeddings, train_values: Tensor, test: PairEmbeddings, test_values: Tensor) -> dict[str, float]:
    """Accuracy of a ridge regression on the picture embeddings, per factor."""
    x = torch.cat([train.image, torch.ones(len(train.image), 1)], 1).double()
    z = torch.cat([test.image, torch.ones(len(test.image), 1)], 1).double()
    gram = x.T @ x + 1e-3 * torch.eye(x.shape[1], dtype=torch.float64)
    out = {}
    for place, (name, count) in enumerate(FACTORS.items()):
        target = nn.functional.one_hot(train_values[:, place], count).double()
        guess = (z @ torch.linalg.solve(gram, x.T @ target)).argmax(1)
        out[name] = float((guess == test_values[:, place]).double().mean())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--stage-steps", type=int, default=75, help="T, steps of one stage")
    parser.add_argument("--router-steps", type=int, default=40, help="R, steps of the routers")
    parser.add_argument("--base-steps", type=int, default=400, help="steps of the base")
    parser.add_argument("--pictures", type=int, default=10_000, help="training pictures")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the stages")
    parser.add_argument("--full-lr", type=float, default=1e-3, help="learning rate where everything trains")
    parser.add_argument("--router-lr", type=float, default=3e-3, help="learning rate of the routers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_options(arguments.out, {name: value for name, value in vars(arguments).items() if name not in ("out", "seeds")})
    stage = PairTraining(
        steps=arguments.stage_steps, batch_size=128, lr=arguments.lr, weight_decay=0.05, warmup=10, label_smoothing=0.0
    )
    router = PairTraining(
        steps=arguments.router_steps, batch_size=128, lr=arguments.router_lr, weight_decay=0.01, warmup=5, label_smoothing=0.0
    )
    size = Size(
        pictures=arguments.pictures,
        test_pictures=1500,
        base_steps=arguments.base_steps,
        budget=Budget(stage=stage, router=router, full_lr=arguments.full_lr),
    )
    results = {}
    for seed in arguments.seeds:
        results[seed] = SeedRun(arguments.out, seed, size.budget, partial(make_world, seed, size)).run()
        write_csv(arguments.out / "results.csv", results)
    write_json(arguments.out / "environment.json", asdict(provenance_of_process()))
    metrics = ["R@1 image to text", "R@1 text to image", *(f"pairs {name}" for name in FACTORS)]
    print_tables(results, metrics, against=("dense all", "plain", "dmu: random router"))


if __name__ == "__main__":
    main()

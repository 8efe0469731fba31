"""An upcycled Llama is a real Hugging Face Mixtral in both layouts, loads back equal, and the expert interfaces agree."""

import copy
import math

import pytest
import torch
from torch import nn

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.attention.attention_calls import mixed_attentions
from upcycle3d.perception.moe.attention.attention_sites import plan_attentions
from upcycle3d.perception.moe.checkpoints.mixtral import mixtral_as_mixture, save_as_mixtral, to_mixtral
from upcycle3d.perception.moe.checkpoints.transformers_experts import experts_for_transformers, register_backends
from upcycle3d.perception.moe.layers.bank import BankShape, ExpertBank
from upcycle3d.perception.moe.layers.moe_ffn import moe_layers
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.perception.moe.upcycling.bam import bam
from upcycle3d.perception.moe.upcycling.upcyclers import RandomRouters, btx, sparse_copy, step_zero_difference

transformers = pytest.importorskip("transformers", reason="transformers is not installed; Mixtral models need its classes")
pytestmark = pytest.mark.usefixtures("one_thread")
RENORM = RandomRouters(experts=3, rule=TopKRule(k=2, norm="renorm"), std=0.5)


def llama(seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = transformers.LlamaConfig(**sizes, vocab_size=50, max_position_embeddings=64, **changes)
    return transformers.LlamaForCausalLM(config).eval()


def branch(model: nn.Module, seed: int) -> nn.Module:
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor += 0.01 * torch.randn(tensor.shape, generator=draw)
    return other


def ids() -> torch.Tensor:
    return torch.arange(18).view(2, 9) * 5 % 50


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


def upcycled(seed: nn.Module) -> nn.Module:
    """Different experts with unequal gate and up, so a swap of the two cannot pass."""
    return btx([branch(seed, 1), branch(seed, 2)], plan_replacement(seed, experts=3), RENORM, seed=seed).model.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_a_saved_mixtral_loads_back_equal(tmp_path, layout, tied):
    model = upcycled(llama(tie_word_embeddings=tied))
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    saved = save_as_mixtral(model, tmp_path / "mixtral", layout=layout, balance=0.01, tokenizer_from=tmp_path / "dense")
    assert {"README.md", "config.json", "tokenizer.json"} <= set(saved.files)
    again = transformers.AutoModelForCausalLM.from_pretrained(saved.folder).eval()
    assert type(again).__name__ == "MixtralForCausalLM"
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    assert again.config.num_experts_per_tok == 2
    for number, (_, layer) in enumerate(moe_layers(model)):
        block = again.model.layers[number].mlp
        assert torch.equal(block.experts.gate_up_proj, layer.bank.gate_up_proj)
        assert torch.equal(block.gate.weight, layer.router.weight)
    names = {name for name, _ in again.named_parameters()}
    assert len(saved.account.written) == len(again.state_dict()) >= len(names)
    assert "active experts per token | 2" in (saved.folder / "README.md").read_text()


def test_four_identical_experts_are_the_dense_model_and_the_balance_loss_is_on():
    """The library's uniform value is k, so our 0.01 becomes 0.005 there, and the loss is added only with router logits."""
    dense = llama()
    made = sparse_copy(
        dense, plan_replacement(dense, experts=4), RandomRouters(experts=4, rule=TopKRule(k=2, norm="renorm"), std=1e-3)
    )
    mixtral, _ = to_mixtral(made.model, balance=0.01)
    assert float((logits(mixtral) - logits(dense)).abs().max()) < 1e-4
    with torch.no_grad():
        plain, out = dense(ids(), labels=ids()).loss, mixtral(ids(), labels=ids())
    assert float(out.loss - plain) == pytest.approx(0.01 * float(out.aux_loss) / 2, rel=1e-3)
    assert float(out.aux_loss) == pytest.approx(2.0, rel=0.1)


def test_generation_with_a_cache_is_generation_without(tmp_path):
    """Keys of attention experts are cached: an adapter that lost the cache would write other words."""
    seed = llama()
    for key_values in ("expert", "shared"):
        made = bam(
            [branch(seed, 1), branch(seed, 2)],
            plan_replacement(seed, experts=3, active=1),
            plan_attentions(seed, experts=3, key_values=key_values),
            RandomRouters(experts=3, rule=TopKRule(k=1, norm="none")),
            seed=seed,
        ).model.eval()
        assert len(mixed_attentions(made)) == 2
        words = [
            made.generate(ids()[:, :5], max_new_tokens=6, do_sample=False, use_cache=c, pad_token_id=0) for c in (True, False)
        ]
        assert torch.equal(words[0], words[1])
        with pytest.raises(InvalidInput, match=r"save_mixture"):
            to_mixtral(made)


@pytest.mark.parametrize("key_values", ["expert", "shared"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bam_of_equal_llamas_is_the_llama_with_padding_too(key_values, implementation):
    seed = llama(attn_implementation=implementation)
    copies = [copy.deepcopy(seed) for _ in range(2)]
    made = bam(
        copies,
        plan_replacement(seed, experts=3, active=3),
        plan_attentions(seed, experts=3, key_values=key_values),
        RandomRouters(experts=3, rule=None),
        seed=seed,
    )
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    assert step_zero_difference(seed, made.model, lambda m: m(ids()).logits) < 1e-5
    assert step_zero_difference(seed, made.model, lambda m: m(ids(), attention_mask=mask).logits[mask.bool()]) < 1e-5


def test_what_mixtral_cannot_say_is_refused(tmp_path):
    seed = llama()
    one = RandomRouters(experts=3, rule=TopKRule(k=1, norm="none"))
    cases = {
        "another model": sparse_copy(seed, plan_replacement(seed, experts=3, active=1), one).model,
        "is a SoftRouter": sparse_copy(
            seed, plan_replacement(seed, experts=3, active=3), RandomRouters(experts=3, rule=None)
        ).model,
        r"layers.1.mlp is dense": sparse_copy(seed, plan_replacement(seed, experts=3, only=["model.layers.0.*"]), RENORM).model,
        "only an upcycled Llama": nn.Linear(2, 2),
    }
    for message, model in cases.items():
        with pytest.raises(InvalidInput, match=message):
            save_as_mixtral(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(InvalidInput, match="not an empty folder"):
        save_as_mixtral(upcycled(seed), tmp_path / "full")


def test_a_mixtral_becomes_mixtures_with_shared_weights_and_counts():
    mixtral, _ = to_mixtral(upcycled(llama()), balance=0.01)
    before = logits(mixtral)
    assert len(mixtral_as_mixture(mixtral)) == 2
    assert mixtral(ids(), labels=ids()).loss.isfinite()  # its own balance loss would look for the routers that are gone
    torch.testing.assert_close(logits(mixtral), before, rtol=1e-5, atol=1e-6)
    assert sum(moe_layers(mixtral)[0][1].usage.value.use) == 2 * 2 * 18
    torch.testing.assert_close(logits(to_mixtral(mixtral)[0]), before, rtol=1e-5, atol=1e-6)  # and back again
    with pytest.raises(InvalidInput, match="no block"):
        mixtral_as_mixture(mixtral)


@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True), (False, False), (True, True)])
def test_the_librarys_kernels_compute_our_bank(gated, bias):
    """Forward, and gradients of tokens, router weights and experts, for each of its implementations."""
    torch.manual_seed(0)
    form = BankShape(
        experts=3, width_in=16, width_hidden=24, width_out=16, activation="silu", gated=gated, hidden_bias=bias, out_bias=bias
    )
    bank, config = ExpertBank(form), transformers.MixtralConfig()
    for parameter in bank.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, index = torch.randn(7, 16, requires_grad=True), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [1, 2], [0, 2], [0, 1]])
    weight = torch.rand(7, 2, requires_grad=True)
    results = {}
    for kernel in ("eager", "grouped_mm", "batched_mm"):
        config._experts_implementation = kernel
        module = experts_for_transformers(bank, config)
        out = module(x, index, weight)
        slopes = torch.autograd.grad(out.square().sum(), [x, weight, *bank.parameters()])
        results[kernel] = [out, *slopes]
    for kernel in ("grouped_mm", "batched_mm"):
        for mine, theirs in zip(results["eager"], results[kernel]):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_our_backends_compute_the_librarys_model():
    """Also where its own kernel refuses: an odd width in float64."""
    mixtral, _ = to_mixtral(upcycled(llama()))
    before = logits(mixtral)
    mixtral.set_experts_implementation(register_backends())
    torch.testing.assert_close(logits(mixtral), before, rtol=1e-5, atol=1e-6)
    assert math.isfinite(float(logits(mixtral.double()).sum()))

"""Surgery on the real classes of Hugging Face transformers, tiny and with random weights. Without the package these tests are skipped."""

import pytest
import torch

import moe_lookalikes as look
from upcycle3d.perception.moe.layers.moe_ffn import moe_layers
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.perception.moe.upcycling.upcyclers import RandomRouters, sparse_copy, step_zero_difference

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; the look-alike blocks of the other tests stand in for its classes"
)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def language(kind):
    config = kind(**SIZES, num_key_value_heads=1, vocab_size=50, max_position_embeddings=32)
    return transformers.AutoModelForCausalLM.from_config(config), lambda m: m(torch.arange(10)[None]).logits


def vision(kind, **more):
    model = transformers.AutoModel.from_config(kind(**SIZES, image_size=16, patch_size=8, **more))
    return model, lambda m: m(torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16)).last_hidden_state


def clip():
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 49, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**SIZES, "image_size": 16, "patch_size": 8}, projection_dim=8
    )

    def run(model):
        ids = torch.tensor([[0, 5, 6, 49]])
        return model(input_ids=ids, pixel_values=torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16)).logits_per_image

    return transformers.CLIPModel(config), run


def bert():
    model = transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=50, max_position_embeddings=32))
    return model, lambda m: m(torch.arange(10)[None]).last_hidden_state


def gpt2():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32))
    return model, lambda m: m(torch.arange(10)[None]).logits


MODELS = {
    "llama": (lambda: language(transformers.LlamaConfig), 2, "silu"),
    "mistral": (lambda: language(transformers.MistralConfig), 2, "silu"),
    "clip": (clip, 4, "quick_gelu"),
    "vit": (lambda: vision(transformers.ViTConfig), 2, "gelu"),
    "dinov2": (lambda: vision(transformers.Dinov2Config, mlp_ratio=2), 2, "gelu"),
    "dinov2-swiglu": (lambda: vision(transformers.Dinov2Config, mlp_ratio=2, use_swiglu_ffn=True), 2, "silu"),
    "bert": (bert, 2, "gelu"),
    "gpt2": (gpt2, 2, "gelu_tanh"),
}


@pytest.mark.parametrize("name", MODELS)
def test_equal_experts_are_the_dense_model_at_step_0(name):
    make, count, activation = MODELS[name]
    torch.manual_seed(0)
    model, run = make()
    look.randomized(model)
    plan = plan_replacement(model, experts=4)
    assert len(plan.sites) == count, str(plan)
    assert {site.activation for site in plan.sites} == {activation}
    made = sparse_copy(model, plan, RandomRouters(experts=4, rule=TopKRule(k=2, norm="renorm")))
    assert len(moe_layers(made.model)) == count
    assert step_zero_difference(model, made.model, run) < 1e-4

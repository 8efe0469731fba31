"""The decode engine against the library's own Llama and Mistral: equal logits with the same masks, whatever the configuration says."""

import pytest
import torch

from moe_served import LetterCoder, computation_of, engine_for, send
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.carving.activity import measure_activity
from upcycle3d.perception.moe.carving.masked_ffn import mask_ffns
from upcycle3d.perception.moe.carving.pre_gate import LayerRouter, PreGateConfig
from upcycle3d.perception.moe.carving.splits import readme_split
from upcycle3d.perception.moe.checkpoints.carved_models import LoadedCarved, save_carved
from upcycle3d.perception.moe.layers.control_routers import given_routing
from upcycle3d.perception.moe.serving.key_values import CacheSpan
from upcycle3d.perception.moe.serving.llama_decoder import LlamaDecoder
from upcycle3d.perception.moe.serving.served_models import open_served, write_served
from upcycle3d.perception.moe.surgery.replacement import plan_replacement

transformers = pytest.importorskip("transformers", reason="transformers is not installed; these tests serve its Llama")
pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def carved_llama(folder, *, mistral: bool = False, routers=None, **changed):
    kind = "Mistral" if mistral else "Llama"
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changed})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # biases and norms, too
    texts = {"low": [torch.randint(0, 20, (4, 12))], "high": [torch.randint(20, 40, (4, 12))]}
    plan = plan_replacement(model, experts=2, active=1)
    activity = measure_activity(model, plan, texts, lambda m, ids: m(ids), least_tokens=0)
    carving = readme_split(activity, 0.5)
    gate = PreGateConfig(vocabulary=40, experts=2, width=8, heads=2).build(0).eval()
    masked = mask_ffns(model, carving, routers)
    said = save_carved(folder / "carved.safetensors", masked, carving, pre_gate=gate)
    return LoadedCarved(model=masked, carving=carving, pre_gate=gate, description=said)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"rope_parameters": LLAMA3, "head_dim": 8, "num_key_value_heads": 1},
        {"mistral": True, "sliding_window": None, "num_key_value_heads": 4},
    ],
    ids=["plain", "tied and biases", "llama3 angles", "mistral"],
)
def test_logits_and_texts_are_the_librarys(changed, tmp_path):
    carved = carved_llama(tmp_path, **changed)
    write_served(tmp_path, carved, name="tiny")
    served = open_served(tmp_path)
    assert served.backbone.tied == changed.get("tie_word_embeddings", False)

    def library(ids):
        row = torch.tensor([ids])
        with given_routing(carved.model, carved.pre_gate.decide(row)), torch.no_grad():
            return carved.model(input_ids=row).logits[0]

    computation, store = computation_of(tmp_path, whole=False)
    for piece in range(store.layout.pieces):
        store.load(piece)
    decoder, text = LlamaDecoder(served.backbone), [*list(range(3, 40, 2)), 7, 7, 0]
    cache = decoder.new_cache(len(text))
    chosen = carved.pre_gate.decide(torch.tensor([text])).index[:, 0].tolist()
    found = []
    for count in (15, 1, 1, 5):
        first = cache.used

        def add_own(layer, x, y, first=first):
            for place in range(len(x)):
                y[place] += store.part(expert=chosen[first + place], layer=layer).apply(x[place : place + 1])[0]

        ids = torch.tensor(text[first : first + count])
        found.append(decoder.logits(decoder.forward(ids, [CacheSpan(cache=cache, first=0, count=count)], add_own)))
    torch.testing.assert_close(torch.cat(found), library(text), rtol=2e-4, atol=2e-4)
    for piece in range(store.layout.pieces):
        store.drop(piece)
    engine, _ = engine_for(computation, store, budget=10**6)
    prompts = [text[:5], text[5:7]]
    told = [send(engine, computation, str(i), prompt, 4) for i, prompt in enumerate(prompts)]
    engine.shut_down()
    engine.run()
    end = served.description.shape.end_tokens
    for prompt, one in zip(prompts, told):
        ids = list(prompt)
        for token in one.tokens:
            best = library(ids)[-1].topk(2).values
            assert int(library(ids)[-1].argmax()) == token or best[0] - best[1] < 1e-3
            ids.append(token)
        assert len(one.tokens) == 4 or one.tokens[-1] in end
        assert one.text == LetterCoder().decode([t for t in one.tokens if t not in end])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mistral": True, "sliding_window": 8}, "its attention sees 8 tokens only"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "depend on the length"),
        ({"routers": lambda site, ffn, units: LayerRouter(site.width_in, units.experts)}, "routers of their own"),
    ],
    ids=["window", "dynamic angles", "layer-wise routers"],
)
def test_what_the_engine_would_compute_differently_is_refused(changed, message, tmp_path):
    carved = carved_llama(tmp_path, **changed)
    with pytest.raises(InvalidInput, match=message):
        write_served(tmp_path, carved, name="tiny")
    assert not (tmp_path / "backbone.safetensors").exists()


def test_other_models_are_refused(tmp_path):
    carved = carved_llama(tmp_path)
    carved.model.config.model_type = "qwen2"
    with pytest.raises(InvalidInput, match="the engine computes Llama and Mistral"):
        write_served(tmp_path, carved, name="tiny")

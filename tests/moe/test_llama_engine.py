"""The decode engine computes what the model computes: the same logits and texts, whatever is batched, cached, loaded and dropped."""

import pytest
import torch

from moe_served import (
    GREEDY,
    LETTERS,
    VOCABULARY,
    Carved,
    LetterCoder,
    Told,
    carved_lm,
    computation_of,
    engine_for,
    send,
)
from upcycle3d.core.errors import InvalidInput, NonFiniteValue
from upcycle3d.perception.moe.runtime.engine import Ungated
from upcycle3d.perception.moe.runtime.requests import QueueFull, Request
from upcycle3d.perception.moe.serving.key_values import CacheSpan
from upcycle3d.perception.moe.serving.llama_decoder import LlamaDecoder, PreGateDecoder
from upcycle3d.perception.moe.serving.llama_engine import Completion, LlamaLimits
from upcycle3d.perception.moe.serving.sampling import Sampler, Sampling, nucleus
from upcycle3d.perception.moe.serving.served_models import open_served
from upcycle3d.perception.moe.serving.text_stream import TextStream

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[3, 30, 12, 5], [7], [20, 21, 22, 1, 2, 39, 0, 8, 9], [14, 33]]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Carved:
    return carved_lm(tmp_path_factory.mktemp("small"))


def test_logits_of_a_mixed_batch_are_those_of_the_whole_texts(small):
    """Prompts and later tokens of several requests stand in one batch; each sees its own tokens only."""
    served = open_served(small.folder)
    decoder = LlamaDecoder(served.backbone)
    gate = PreGateDecoder(served.pre_gate)
    model_experts = {layer.site: layer for layer in (m for m in small.masked.modules() if hasattr(m, "own"))}
    layers = list(model_experts.values())
    caches = [(decoder.new_cache(12), gate.new_cache(12)) for _ in PROMPTS]
    texts = [[*prompt, 11, 4, 2] for prompt in PROMPTS]
    steps = [
        [2, 1, 5, 0],
        [0, 0, 3, 2],
        [2, 2, 2, 2],
        [3, 1, 2, 1],
    ]  # tokens of each request in each batch: some in several pieces
    for counts in steps:
        ids, spans, gates, wanted = [], [], [], []
        for text, (cache, own), count in zip(texts, caches, counts):
            new = text[cache.used : cache.used + count]
            if not new:
                continue
            spans.append(CacheSpan(cache=cache, first=len(ids), count=len(new)))
            gates.append(CacheSpan(cache=own, first=len(ids), count=len(new)))
            wanted.append(small.logits(text[: cache.used + len(new)])[-len(new) :])
            ids += new
        chosen = torch.tensor(gate.decide(torch.tensor(ids), gates))

        def add_own(layer, x, y, chosen=chosen):
            for place, expert in enumerate(chosen.tolist()):
                hidden = layers[layer].ffn.hidden(x[place]) * layers[layer].own[expert]
                y[place] += torch.nn.functional.linear(hidden, layers[layer].ffn.down)

        logits = decoder.logits(decoder.forward(torch.tensor(ids), spans, add_own))
        torch.testing.assert_close(logits, torch.cat(wanted), rtol=1e-6, atol=1e-6)  # angles are float32
    assert [cache.used for cache, _ in caches] == [len(text) for text in texts]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("form", ["masked", "split", "fused"])
def test_greedy_texts_equal_the_models_in_every_form_and_at_a_small_budget(whole, form, tmp_path):
    made = carved_lm(tmp_path, form=form)
    computation, store = computation_of(tmp_path, whole=whole)
    largest = max(store.bytes_of(piece) for piece in range(store.layout.pieces))
    budget = sum(store.form.expert_bytes) if whole else largest  # one piece at a time; a prompt needs its experts together
    engine, ends = engine_for(computation, store, budget=budget, tokens=16)
    told = [send(engine, computation, str(i), prompt, 6) for i, prompt in enumerate(PROMPTS)]
    engine.shut_down()
    engine.run()
    assert [t.tokens for t in told] == [made.greedy(prompt, 6) for prompt in PROMPTS]
    assert [t.finish for t in told] == ["length"] * 4
    assert [t.text for t in told] == [LetterCoder().decode(t.tokens) for t in told]
    assert {end.status for end in ends} == {"served"}
    report = engine.report()
    assert report.memory.most_bytes <= budget
    assert store.resident_bytes == report.memory.resident_bytes  # the runtime's count is what is in memory
    assert computation.budget.reserved == 0
    if not whole:
        assert report.memory.evictions > 0


def test_a_model_with_one_expert_needs_no_gate_and_ratio_1_is_the_dense_model(tmp_path):
    for number, (experts, ratio) in enumerate([(1, 0.5), (1, 1.0), (2, 1.0)]):
        folder = tmp_path / str(number)
        made = carved_lm(folder, experts=experts, ratio=ratio)
        computation, store = computation_of(folder, whole=False)
        engine, _ = engine_for(computation, store, budget=10**6)
        told = send(engine, computation, "1", PROMPTS[0], 5)
        engine.shut_down()
        engine.run()
        assert told.tokens == made.greedy(PROMPTS[0], 5)


def test_decisions_are_kept_and_never_asked_for_twice(small):
    """The engine asks again after an error, and a near tie must not flip then; nor may a token be counted twice in the gate's cache."""
    computation, _ = computation_of(small.folder, whole=False)
    request = Request(
        id="1", kind="sequence", tokens=4, new_tokens=3, payload=Completion(prompt=(3, 30, 12, 5), sampling=GREEDY, told=Told())
    )
    computation.open(request)
    first = computation.gate([Ungated(request=request, generated=0)])
    wanted = small.gate.decide(torch.tensor([[3, 30, 12, 5]])).index[:, 0].tolist()
    assert first == [tuple(wanted)]
    computation._gate.decide = None  # whoever decides again fails
    assert computation.gate([Ungated(request=request, generated=0)]) == first
    assert computation._open["1"].gate_cache.used == 4
    assert computation._open["1"].gate_cache.length == 6  # room for the whole request and no more


def test_the_pre_gates_decoder_decides_as_the_pre_gate(small):
    gate = PreGateDecoder(small.gate)
    cache = gate.new_cache(9)
    text, found = PROMPTS[2], []
    for count in (4, 1, 1, 3):
        new = text[cache.used : cache.used + count]
        found += gate.decide(torch.tensor(new), [CacheSpan(cache=cache, first=0, count=count)])
    assert found == small.gate.decide(torch.tensor([text])).index[:, 0].tolist()
    assert gate.decide(torch.empty(0, dtype=torch.int64), []) == []
    with pytest.raises(InvalidInput, match="1 more do not fit"):
        CacheSpan(cache=cache, first=0, count=1)


def test_draws_belong_to_the_request_and_not_to_the_batch(small):
    sampling = Sampling(temperature=0.9, top_p=0.8, seed=5)
    alone = []
    for others in (0, 3):
        computation, store = computation_of(small.folder, whole=False)
        engine, _ = engine_for(computation, store, budget=10**6)
        for i in range(others):
            send(engine, computation, f"other {i}", PROMPTS[i], 4, sampling=Sampling(seed=i))
        told = send(engine, computation, "mine", PROMPTS[3], 8, sampling=sampling)
        engine.shut_down()
        engine.run()
        alone.append(told.tokens)
    assert alone[0] == alone[1]


def test_texts_end_at_end_tokens_and_stop_strings(small, tmp_path):
    free = small.greedy(PROMPTS[3], 8)
    text = LetterCoder().decode(free)
    cut = next(i for i in range(2, 7) if text.find(text[i : i + 2]) == i and free[i] not in free[:i])
    computation, store = computation_of(small.folder, whole=False)
    engine, ends = engine_for(computation, store, budget=10**6)
    stopped = send(engine, computation, "1", PROMPTS[3], 8, stop=["??", text[cut : cut + 2]])
    engine.shut_down()
    engine.run()
    assert (stopped.text, stopped.finish) == (text[:cut], "stop")
    assert len(stopped.tokens) == cut + 2
    assert ends[0].generated == cut + 2
    ended = carved_lm(tmp_path, end=(free[cut],))
    computation, store = computation_of(ended.folder, whole=True)
    engine, _ = engine_for(computation, store, budget=10**6)
    told = send(engine, computation, "1", PROMPTS[3], 8)
    engine.shut_down()
    engine.run()
    assert (told.text, told.finish, told.tokens[-1]) == (text[:cut], "stop", free[cut])


def test_what_cannot_be_served_is_refused_when_it_is_opened(small):
    computation, _ = computation_of(small.folder, whole=False, limits=LlamaLimits(longest=20, cache_bytes=16_000))

    def request(id, prompt, new, **changed):
        payload = Completion(prompt=tuple(prompt), sampling=GREEDY, told=Told())
        return Request(**{"id": id, "kind": "sequence", "tokens": len(prompt), "new_tokens": new, "payload": payload, **changed})

    for asked, message in (
        (request("1", [1] * 15, 6), "longer than the 20 tokens"),
        (request("1", [1, VOCABULARY], 2), f"0..{VOCABULARY - 1}"),
        (request("1", [1, 2], 2, tokens=3), "must be a sequence of its 2 tokens"),
        (request("1", [1, 2], 2, payload=None), "needs a Completion"),
    ):
        with pytest.raises(InvalidInput, match=message):
            computation.open(asked)
    assert computation.budget.reserved == 0
    first = request("1", [1] * 10, 5)
    computation.open(first)
    size = computation.budget.reserved
    assert size == 14 * (2 * 3 * 2 * 4 * 8 + 2 * 1 * 8 * 8)  # the model's keys and values, and the pre-gate's
    computation.open(request("2", [1] * 10, 5))
    with pytest.raises(InvalidInput, match="is open already"):
        computation.open(first)
    with pytest.raises(QueueFull, match="the bound is 16,000"):
        computation.open(request("3", [1] * 15, 5))
    computation.release(first)
    computation.open(request("3", [1] * 10, 5))
    small_bound, _ = computation_of(small.folder, whole=False, limits=LlamaLimits(cache_bytes=1000))
    with pytest.raises(InvalidInput, match="all requests together have 1,000"):
        small_bound.open(first)


class FailingStore:
    """Cannot load one piece."""

    def __init__(self, store) -> None:
        self.store = store

    def bytes_of(self, expert):
        return self.store.bytes_of(expert)

    def load(self, expert):
        if expert == self.store.layout.piece(1, 1):
            raise InvalidInput("the disk is gone")
        self.store.load(expert)

    def drop(self, expert):
        self.store.drop(expert)


def test_a_piece_that_cannot_be_loaded_ends_only_the_requests_that_need_it(small):
    alone = {}
    for prompt in range(VOCABULARY):
        experts = set(small.gate.decide(torch.tensor([[prompt]])).index[:, 0].tolist())
        alone.setdefault(experts.pop(), [prompt])
    computation, store = computation_of(small.folder, whole=False)
    engine, ends = engine_for(computation, store, budget=10**6, store_of=FailingStore)
    told = {expert: send(engine, computation, str(expert), prompt, 1) for expert, prompt in alone.items()}
    engine.shut_down()
    engine.run()
    assert {end.id: end.status for end in ends} == {str(e): "failed" if e == 1 else "served" for e in alone}
    for expert, prompt in alone.items():
        assert told[expert].tokens == ([] if expert == 1 else small.greedy(prompt, 1))
    assert 1 in alone
    assert len(alone) > 1


def test_sampling_is_that_of_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampler = Sampler(Sampling(temperature=0.5, seed=3))
    draws = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(draws, (logits / 0.5).softmax(0), rtol=0, atol=0.03)
    assert Sampler(Sampling(temperature=0)).choose(torch.tensor([1.0, 3.0, 3.0])) == 1
    assert nucleus(torch.tensor([0.5, 0.3, 0.2]), 0.5).tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(nucleus(torch.tensor([0.2, 0.3, 0.5]), 0.6), torch.tensor([0.0, 0.375, 0.625]))
    for bad in (torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf, 0.0])):
        with pytest.raises(NonFiniteValue, match="NaN or infinite logits"):
            sampler.choose(bad)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}):
        with pytest.raises(InvalidInput):
            Sampling(**wrong)


class ByteCoder:
    """Tokens are bytes, so letters may need several."""

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("stop", [(), ("für",), ("\n\n", "x"), ("ab",)])
def test_a_stream_sends_whole_letters_and_never_a_stop_string(stop):
    """Whatever the token boundaries are, the parts together are the text until the first stop string."""
    text = "Grüße für 日本 aab\n\nx ende"
    stream = TextStream(ByteCoder(), stop=stop)
    parts = [stream.add(token) for token in text.encode()] + [stream.rest()]
    places = [text.find(word) for word in stop if word in text]
    assert "".join(parts) == (text[: min(places)] if places else text)
    assert all("\ufffd" not in part for part in parts)
    assert stream.stopped == bool(places)


def test_bytes_that_never_become_a_letter_are_sent_at_the_end():
    stream = TextStream(ByteCoder())
    assert stream.add(ord("a")) == "a"
    assert stream.add(0xE6) == ""
    assert stream.rest() == "\ufffd"
    with pytest.raises(InvalidInput, match="must not be empty"):
        TextStream(ByteCoder(), stop=("",))


def test_letters_of_the_coder_come_back():
    assert LetterCoder().decode(LetterCoder().encode("read me, 42!")) == "read me, 42!"
    assert len(set(LETTERS)) == VOCABULARY

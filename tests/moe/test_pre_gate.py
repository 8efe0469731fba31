"""A pre-gate decides before the model runs: the same in one pass, token by token, with padding, and in every layer of the model."""

import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.carving.activity import measure_activity
from upcycle3d.perception.moe.carving.carved_ffn import carved_layers, materialize
from upcycle3d.perception.moe.carving.masked_ffn import mask_ffns, masked_layers
from upcycle3d.perception.moe.carving.pre_gate import LayerRouter, PreGate, PreGateConfig, embedding_start, top1_decision
from upcycle3d.perception.moe.carving.splits import readme_split
from upcycle3d.perception.moe.language.small_lm import SmallLmConfig
from upcycle3d.perception.moe.layers.control_routers import OracleRouter, given_routing
from upcycle3d.perception.moe.surgery.replacement import plan_replacement

BLOCKS = pytest.mark.parametrize(("blocks", "context"), [(1, True), (2, True), (1, False)])


def gate_of(blocks: int = 1, context: bool = True, seed: int = 0) -> PreGate:
    config = PreGateConfig(vocabulary=30, experts=4, width=16, heads=2, blocks=blocks, context=context)
    gate = config.build(seed)
    with torch.no_grad():
        for parameter in gate.parameters():  # random logits that differ clearly
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + parameter.numel())) * 0.5)
    return gate.double()


def ids_of(batch: int = 3, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 30, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_hand(gate: PreGate, row: list[int]) -> torch.Tensor:
    """Logits of one sequence by plain loops over heads, queries and keys; positions are complex rotations."""
    c = gate.config
    head = c.width // c.heads
    half = head // 2
    speed = torch.tensor([c.base ** (-2 * i / head) for i in range(half)], dtype=torch.float64)

    def norm(x: torch.Tensor, m: torch.nn.RMSNorm) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * m.weight

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half, dtype=torch.float64), position * speed)
        return torch.cat([z.real, z.imag])

    x = gate.embed.weight[row]
    for block in gate.blocks:
        if c.context:
            read = norm(x, block.norm1)
            q, k, v = block.q(read), block.k(read), block.v(read)
            out = torch.zeros_like(x)
            for h in range(c.heads):
                part = slice(h * head, (h + 1) * head)
                for t in range(len(row)):
                    scores = torch.stack([turned(q[t, part], t) @ turned(k[s, part], s) for s in range(t + 1)]) / head**0.5
                    out[t, part] = scores.softmax(0) @ v[: t + 1, part]
            x = x + block.o(out)
        x = x + block.down(torch.nn.functional.silu(block.up(norm(x, block.norm2))))
    return gate.head(norm(x, gate.norm))


@BLOCKS
def test_logits_are_those_of_plain_loops(blocks, context):
    gate, ids = gate_of(blocks, context), ids_of()
    found = gate(ids).logits
    for row in range(3):
        torch.testing.assert_close(found[row], by_hand(gate, ids[row].tolist()), rtol=1e-10, atol=1e-10)


@BLOCKS
@pytest.mark.parametrize("cut", [[1] * 9, [4, 1, 4], [0, 9]])
def test_new_tokens_cost_one_step_and_change_no_decision(blocks, context, cut):
    """With a cache, only new tokens are computed; decisions are those of one pass over everything."""
    gate, ids = gate_of(blocks, context), ids_of()
    whole, cache, parts, computed = gate(ids), None, [], []
    gate.head.register_forward_hook(lambda m, args, out: computed.append(out.shape[1]))
    for some in ids.split(cut, 1):
        step = gate(some, cache=cache)
        cache = step.cache
        parts.append(step.logits)
    assert computed == cut
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found, whole.logits, rtol=1e-10, atol=1e-12)
    assert torch.equal(found.argmax(-1), whole.logits.argmax(-1))
    assert torch.equal(cache.positions, torch.tensor([9, 9, 9]))
    kept = cache.rows(torch.tensor([2, 0]))
    later = torch.cat([ids, ids[:, :1]], 1)
    torch.testing.assert_close(
        gate(ids[[2, 0], :1], cache=kept).logits[:, 0], gate(later[[2, 0]]).logits[:, -1], rtol=1e-10, atol=1e-12
    )


def test_it_sees_no_future_and_the_control_sees_no_past():
    ids = ids_of()
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 30
    for context in (True, False):
        gate = gate_of(context=context)
        moved = (gate(ids).logits - gate(changed).logits).abs().amax((0, 2)) > 1e-9
        assert moved.tolist() == [False] * 5 + [True] + [context] * 3


@BLOCKS
def test_padding_on_either_side_changes_nothing(blocks, context):
    """Rows of 9, 6 and 4 tokens, filled up with any number, even one that is no token."""
    gate, ids = gate_of(blocks, context), ids_of()
    lengths = [9, 6, 4]
    for left in (True, False):
        filled, padding = torch.full((3, 9), -100), torch.ones(3, 9, dtype=torch.bool)
        for row, length in enumerate(lengths):
            at = slice(9 - length, 9) if left else slice(0, length)
            filled[row, at], padding[row, at] = ids[row, :length], False
        found = gate(filled, padding=padding)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(
                found.logits[row][~padding[row]], gate(ids[row : row + 1, :length]).logits[0], rtol=1e-9, atol=1e-11
            )
        assert float(found.logits.detach()[padding].abs().max()) == 0
        assert found.cache.positions.tolist() == lengths
        new = torch.tensor([[3], [4], [5]])  # goes on behind the padding
        step = gate(new, cache=found.cache).logits[:, 0]
        for row, length in enumerate(lengths):
            longer = torch.cat([ids[row, :length], new[row]])[None]
            torch.testing.assert_close(step[row], gate(longer).logits[0, -1], rtol=1e-9, atol=1e-11)


def test_empty_batches_and_what_does_not_fit():
    gate = gate_of()
    assert gate(torch.zeros(0, 5, dtype=torch.int64)).logits.shape == (0, 5, 4)
    assert gate(torch.zeros(2, 0, dtype=torch.int64)).logits.shape == (2, 0, 4)
    assert gate.decide(torch.zeros(2, 0, dtype=torch.int64)).index.shape == (0, 1)
    with pytest.raises(InvalidInput, match=r"tokens lie in 0\.\.30, and the pre-gate knows 0\.\.29"):
        gate(torch.tensor([[0, 30]]))
    with pytest.raises(InvalidInput, match="attention_mask == 0"):
        gate(torch.tensor([[0, 1]]), padding=torch.tensor([[1, 1]]))
    with pytest.raises(InvalidInput, match="the cache belongs to 2 sequences"):
        gate(torch.tensor([[0, 1]]), cache=gate(torch.tensor([[0], [1]])).cache)
    with pytest.raises(InvalidInput, match="multiple of 2 x 3 heads"):
        PreGateConfig(vocabulary=3, experts=2, width=16, heads=3)


def test_the_decision_has_one_expert_of_weight_1_and_no_gradient_reaches_the_router_through_it():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]], requires_grad=True)
    decision = top1_decision(logits)
    assert decision.index.tolist() == [[1], [0]]
    assert decision.weight.tolist() == [[1.0], [1.0]]
    assert not decision.weight.requires_grad


def test_the_first_embedding_keeps_what_tells_tokens_apart():
    """Tokens that differ in two of six columns: two leading directions keep their distances, the first two columns do not."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 6, generator=draw, dtype=torch.float64) * torch.tensor([0.01, 0.01, 0.01, 0.01, 3.0, 2.0])
    first, columns = embedding_start(weight, 2), embedding_start(weight, 2, "columns")
    for made in (first, columns):
        assert float(made.square().mean()) == pytest.approx(1.0)
    true = torch.cdist(weight, weight).flatten()
    assert float(torch.corrcoef(torch.stack([true, torch.cdist(first, first).flatten()]))[0, 1]) > 0.999
    assert float(torch.corrcoef(torch.stack([true, torch.cdist(columns, columns).flatten()]))[0, 1]) < 0.5
    gate = PreGateConfig(vocabulary=40, experts=2, width=4, heads=1).build(0, embedding=embedding_start(weight, 4))
    torch.testing.assert_close(gate.embed.weight, embedding_start(weight, 4).float())
    with pytest.raises(InvalidInput, match="lower the pre-gate's width"):
        embedding_start(weight, 8)


@pytest.fixture(scope="module")
def language_model():
    """A small decoder, its carving of two domains (small and large bytes), and data."""
    model = SmallLmConfig(vocabulary=30, width=16, hidden=24, layers=3, heads=2, kv_heads=2).build(0).eval()
    plan = plan_replacement(model, experts=2, active=1)
    domains = {"low": [ids_of(seed=2) % 15], "high": [15 + ids_of(seed=3) % 15]}
    carving = readme_split(measure_activity(model, plan, domains, lambda m, ids: m(ids), least_tokens=0), 0.5)
    return model, carving


def test_its_decisions_are_the_routing_that_every_layer_uses(language_model):
    """The runtime may plan with them: no layer decides anything else, in training and in serving form."""
    model, carving = language_model
    gate = PreGateConfig(vocabulary=30, experts=2, width=16, heads=2).build(3)
    ids = ids_of()
    decision = gate.decide(ids)
    assert set(decision.index.flatten().tolist()) == {0, 1}
    masked = mask_ffns(model, carving)
    outputs = []
    for form in (masked, materialize(masked), materialize(masked, fuse=True)):
        with given_routing(form, decision), torch.no_grad():
            outputs.append(form(ids).logits)
        layers = masked_layers(form) if form is masked else carved_layers(form)
        assert len(layers) == 3
        for layer in layers:
            assert torch.equal(layer.last_routing.index, decision.index)
            assert torch.equal(layer.last_routing.weight, torch.ones(27, 1))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-5, atol=1e-5)


def test_a_decision_per_text_is_an_oracle_of_domains(language_model):
    """All tokens of a text go to the expert of its domain, and texts do not disturb each other."""
    model, carving = language_model
    masked, ids = mask_ffns(model, carving), ids_of(2)
    with given_routing(masked, OracleRouter(2).decide(torch.tensor([1, 0]))), torch.no_grad():
        both = masked(ids).logits
    for row, domain in enumerate((1, 0)):
        with given_routing(masked, OracleRouter(2).decide(torch.tensor([domain]))), torch.no_grad():
            torch.testing.assert_close(both[row : row + 1], masked(ids[row : row + 1]).logits, rtol=1e-5, atol=1e-5)


def test_layer_wise_routers_decide_in_each_layer_and_give_the_model_no_gradient(language_model):
    model, carving = language_model
    masked = mask_ffns(model, carving, lambda site, ffn, units: LayerRouter(site.width_in, units.experts))
    masked(ids_of()).logits.square().mean().backward()
    for layer in masked_layers(masked):
        assert layer.router.linear.weight.grad is None
        assert layer.ffn.up.grad is not None
        assert torch.equal(layer.last_routing.index[:, 0], layer.last_routing.logits.argmax(1))
        assert layer.take_routing() is not None
        assert layer.take_routing() is None
    with torch.no_grad():
        torch.testing.assert_close(materialize(masked)(ids_of()).logits, masked(ids_of()).logits, rtol=1e-5, atol=1e-5)

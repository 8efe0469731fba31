"""The soft mixture of attentions against plain loops over separate attentions, with gradients, masks and empty input."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.attention.dense_attention import DenseAttention
from upcycle3d.perception.moe.attention.soft_attention import SoftAttention, share_key_values

WIDTH, OTHER, OUT = 6, 5, 7
HEADS = {"equal": (2, 2), "grouped": (4, 2), "one_key_head": (3, 1)}


def dense(
    seed: int, heads: int = 4, kv_heads: int = 2, *, bias: bool = True, other: int = WIDTH, out: int = WIDTH
) -> DenseAttention:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / 2

    width = 4
    return DenseAttention(
        q=draw(heads * width, WIDTH),
        k=draw(kv_heads * width, other),
        v=draw(kv_heads * width, other),
        o=draw(out, heads * width),
        q_bias=draw(heads * width) if bias else None,
        k_bias=draw(kv_heads * width) if bias else None,
        v_bias=draw(kv_heads * width) if bias else None,
        o_bias=draw(out) if bias else None,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        scale=0.4,
    )


def mixture(experts: list[DenseAttention], **options) -> SoftAttention:
    return SoftAttention.from_dense(experts, generator=torch.Generator().manual_seed(9), **options)


def tokens(batch: int = 2, length: int = 5, width: int = WIDTH, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


def one_query(expert: DenseAttention, x: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
    """The textbook: one query (D,), keys (L, Dk), seen (heads, L), head by head without any batched call."""
    zeros = torch.zeros(1, dtype=x.dtype)
    q = expert.q @ x + (zeros if expert.q_bias is None else expert.q_bias)
    k = keys @ expert.k.T + (zeros if expert.k_bias is None else expert.k_bias)
    v = keys @ expert.v.T + (zeros if expert.v_bias is None else expert.v_bias)
    parts = []
    for head in range(expert.heads):
        own = slice(head * expert.head_dim, (head + 1) * expert.head_dim)
        other = head // (expert.heads // expert.kv_heads)
        theirs = slice(other * expert.head_dim, (other + 1) * expert.head_dim)
        logits = [expert.scale * (q[own] @ row[theirs]) for row in k]
        top = max((float(value) for value, ok in zip(logits, seen[head]) if ok), default=0.0)
        e = [(value - top).exp() if ok else torch.zeros((), dtype=x.dtype) for value, ok in zip(logits, seen[head])]
        total = sum(e) if any(seen[head]) else torch.ones((), dtype=x.dtype)
        parts.append(sum((share / total) * row[theirs] for share, row in zip(e, v)))
    return expert.o @ torch.cat(parts) + (zeros if expert.o_bias is None else expert.o_bias)


def looped(experts: list[DenseAttention], weights: Tensor, x: Tensor, keys: Tensor | None = None, **options) -> Tensor:
    """N separate attentions, one after another, weighted."""
    return sum(weights[..., n, None] * expert.apply(x, keys, **options) for n, expert in enumerate(experts))


def test_the_dense_reference_is_the_textbook():
    """`DenseAttention.apply` is the oracle of everything below, so it is compared with sums over single queries and heads."""
    expert, x, keys = dense(3, other=OTHER, out=OUT), tokens(1, 3), tokens(1, 4, OTHER, seed=2)
    mask = torch.rand(1, 4, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0, 1, 2] = False  # one head of one query sees nothing
    found = expert.apply(x, keys, mask=mask)
    for i in range(3):
        torch.testing.assert_close(found[0, i], one_query(expert, x[0, i], keys[0], mask[0, :, i]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("key_values", ["expert", "shared"])
def test_fused_heads_equal_separate_attentions_with_gradients(key_values, heads, bias):
    """Forward, input gradient and every weight's gradient of the fused form equal those of N attentions in a loop."""
    experts = [dense(n, *heads, bias=bias) for n in range(3)]
    fused, x = mixture(experts, key_values=key_values), tokens().requires_grad_()
    plain = [
        {name: tensor.clone().requires_grad_() for name, tensor in e.tensors().items()}
        for e in (share_key_values(experts) if key_values == "shared" else experts)
    ]
    separate = [replace(expert, **own) for expert, own in zip(experts, plain)]
    router = fused.router.detach().clone().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    expected = looped(separate, (x2 @ router.T).softmax(-1), x2)
    found = fused(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(fused.router.grad, router.grad)
    assert fused.router.grad.abs().sum() > 0
    for name in plain[0]:
        own = torch.stack([weights[name].grad for weights in plain])
        if key_values == "shared" and name[0] in "kv":
            own = own.sum(0, keepdim=True)
        torch.testing.assert_close(getattr(fused, name).grad, own)


def rotary(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Llama's rotary positions, written out: halves of a head turn by angles that grow with the place."""

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    return turned(q), turned(k)


def masks() -> dict[str, dict]:
    generator = torch.Generator().manual_seed(5)
    random = torch.rand(2, 4, 5, 5, generator=generator) < 0.7
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    return {
        "causal": {"causal": True},
        "padding": {"key_padding": padding},
        "all_padding": {"key_padding": torch.tensor([[True] * 5, [False] * 5])},
        "boolean": {"mask": random[0, 0]},
        "per_scene": {"mask": random[:, 0]},
        "per_head": {"mask": random},
        "added_per_head": {"mask": torch.randn(1, 4, 5, 5, generator=generator, dtype=torch.float64)},
        "added_causal_padding": {"mask": random[:, :1].double(), "causal": True, "key_padding": padding},
        "rotary_causal": {"causal": True, "positions": rotary},
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("key_values", ["expert", "shared"])
def test_masks_and_positions_reach_every_expert(key_values, name):
    """Also a scene whose keys are all padding: it gives the output bias, no NaN, and finite gradients."""
    experts = [dense(n) for n in range(2)]
    options, x = masks()[name], tokens().requires_grad_()
    fused = mixture(experts, key_values=key_values)
    found = fused(x, **options)
    separate = share_key_values(experts) if key_values == "shared" else experts
    torch.testing.assert_close(found, looped(separate, fused.expert_weights(x), x, **options))
    found.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in fused.parameters())


@pytest.mark.parametrize("key_values", ["expert", "shared"])
def test_cross_attention_with_other_widths(key_values):
    """Keys and values may differ from the queries in width and length, and the output in width (a detector's decoder)."""
    experts = [dense(n, other=OTHER, out=OUT) for n in range(3)]
    fused, x, keys = mixture(experts, key_values=key_values), tokens(), tokens(2, 3, OTHER, seed=4)
    separate = share_key_values(experts) if key_values == "shared" else experts
    torch.testing.assert_close(fused(x, keys), looped(separate, fused.expert_weights(x), x, keys))
    values = tokens(2, 3, OTHER, seed=6)
    torch.testing.assert_close(fused(x, keys, values), looped(separate, fused.expert_weights(x), x, keys, value=values))


def test_causal_queries_are_the_last_places_of_longer_keys():
    """As with cached keys: the output of the last two places does not depend on whether the first three are computed too."""
    fused, x = mixture([dense(0), dense(1)]), tokens()
    torch.testing.assert_close(fused(x[:, 3:], x, causal=True), fused(x, causal=True)[:, 3:])
    with pytest.raises(InvalidInput, match="at least as many keys"):
        fused(x, x[:, :2], causal=True)


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "renormalize": True}, {"top_k": 3}, {"key_values": "shared"}], ids=str)
def test_equal_experts_are_the_dense_attention_for_any_router(options):
    expert, x = dense(0), tokens()
    torch.testing.assert_close(mixture([expert] * 3, **options)(x, causal=True), expert.apply(x, causal=True))


def test_top_k_keeps_the_largest_weights_and_renormalizes_when_asked():
    """Without renormalization equal experts give the dense output times the weight that is left (for one expert: p_max)."""
    expert, x = dense(0, bias=False), tokens()
    full = mixture([expert] * 4).expert_weights(x).detach()
    cut = mixture([expert] * 4, top_k=2)
    weights = cut.expert_weights(x).detach()
    for row, found in zip(full.flatten(0, 1), weights.flatten(0, 1)):
        kept = sorted(range(4), key=lambda n: -float(row[n]))[:2]
        assert found.tolist() == [float(row[n]) if n in kept else 0.0 for n in range(4)]
    torch.testing.assert_close(cut(x), expert.apply(x) * weights.sum(-1, keepdim=True))
    top1 = mixture([expert] * 4, top_k=1)
    torch.testing.assert_close(top1(x), expert.apply(x) * full.amax(-1, keepdim=True))
    renormalized = mixture([expert] * 4, top_k=2, renormalize=True).expert_weights(x)
    torch.testing.assert_close(renormalized, weights / weights.sum(-1, keepdim=True))


def test_given_weights_replace_the_router():
    """Uniform and known weights are controls; the weight 1 for one expert gives that expert alone."""
    experts, x = [dense(n) for n in range(3)], tokens()
    fused = mixture(experts)
    alone = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(2, 5, 3)
    torch.testing.assert_close(fused(x, expert_weights=alone), experts[1].apply(x))
    with pytest.raises(InvalidInput, match="expert_weights"):
        fused(x, expert_weights=alone[..., :2])


def test_the_fused_form_passes_gradcheck():
    for key_values in ("expert", "shared"):
        fused = mixture([dense(0, 2, 1), dense(1, 2, 1)], key_values=key_values)
        x = tokens(1, 2)

        def of_router(router: Tensor, module: SoftAttention = fused, x: Tensor = x) -> Tensor:
            return torch.func.functional_call(module, {"router": router}, (x,))

        assert torch.autograd.gradcheck(of_router, (fused.router,))
        x.requires_grad_()
        assert torch.autograd.gradcheck(lambda t, f=fused: f(t, causal=True), (x,))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@pytest.mark.parametrize("key_values", ["expert", "shared"])
def test_empty_input_gives_empty_output_and_zero_gradients(key_values, shape):
    fused = mixture([dense(0), dense(1)], key_values=key_values)
    for causal in (False, True):
        fused.zero_grad()
        y = fused(tokens(*shape), causal=causal)
        assert y.shape == (*shape, WIDTH)
        y.square().sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in fused.parameters())


@pytest.mark.parametrize("key_values", ["expert", "shared"])
def test_from_dense_and_to_dense_are_inverse(key_values):
    """Own maps come back bit by bit; shared keys and values are the mean, and equal ones come back bit by bit as well."""
    experts = [dense(n) for n in range(3)]
    fused = mixture(experts, key_values=key_values)
    expected = share_key_values(experts) if key_values == "shared" else experts
    for n, expert in enumerate(expected):
        back = fused.to_dense(n).tensors()
        assert back.keys() == expert.tensors().keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in expert.tensors().items())
    torch.testing.assert_close(share_key_values(experts)[0].k, (experts[0].k + experts[1].k + experts[2].k) / 3)
    same = mixture([experts[0]] * 3, key_values=key_values).to_dense(2).tensors()
    assert all(torch.equal(same[name], tensor) for name, tensor in experts[0].tensors().items())
    fused.q.data.zero_()
    assert experts[0].q.any()  # the mixture holds copies
    with pytest.raises(InvalidInput, match=r"experts 0\.\.2"):
        fused.to_dense(3)


def test_the_router_computes_in_float32_under_autocast():
    """bfloat16 logits would change which expert wins where two are near each other."""
    fused = SoftAttention.from_dense([dense(0), dense(1), dense(2)]).float()
    x = tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        weights, y = fused.expert_weights(x), fused(x)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, fused.expert_weights(x), rtol=0, atol=0)
    torch.testing.assert_close(y.float(), fused(x), rtol=0.05, atol=0.1)
    y.float().square().sum().backward()
    assert fused.router.grad.abs().sum() > 0


def test_the_seed_decides_the_router_and_dropout_acts_in_training_only():
    experts, x = [dense(0), dense(1)], tokens()
    assert torch.equal(mixture(experts).router, mixture(experts).router)
    dropping = mixture(experts, dropout=0.5)
    assert not torch.equal(dropping(x), mixture(experts)(x))
    torch.testing.assert_close(dropping.eval()(x), mixture(experts)(x))


def test_what_does_not_fit_is_refused():
    experts, x = [dense(0), dense(1)], tokens()
    for other, text in (
        (dense(1, 2, 2), "kv_heads, head_dim, scale"),
        (dense(1, bias=False), "expert 1 has the tensors"),
        (dense(1, out=OUT), "o of expert 1"),
    ):
        with pytest.raises(InvalidInput, match=text):
            mixture([experts[0], other])
    with pytest.raises(InvalidInput, match="at least one"):
        mixture([])
    with pytest.raises(InvalidInput, match=r"top_k must be in 1\.\.2"):
        mixture(experts, top_k=3)
    with pytest.raises(InvalidInput, match="router of 2 experts"):
        SoftAttention(experts, torch.zeros(3, WIDTH))
    fused = mixture(experts)
    with pytest.raises(InvalidInput, match="batch first"):
        fused(x[0])
    with pytest.raises(InvalidInput, match="key_padding"):
        fused(x, key_padding=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(InvalidInput, match="queries by keys"):
        fused(x, mask=torch.ones(5, 4, dtype=torch.bool))
    with pytest.raises(InvalidInput, match="1 or 4 heads"):
        fused(x, mask=torch.ones(1, 3, 5, 5, dtype=torch.bool))
    with pytest.raises(InvalidInput, match=r"boolean .* or floating"):
        fused(x, mask=torch.ones(5, 5, dtype=torch.int64))

"""Attentions are read out of modules by structure: each reading computes what the module computes, or is refused."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.attention.attention_readers import attention_of
from upcycle3d.perception.moe.attention.soft_attention import SoftAttention


class LlamaLike(nn.Module):
    """Looks like a Llama's attention: the heads stand in the configuration, 3 query heads per key head, no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=6)
        self.head_dim, self.num_key_value_groups, self.scaling = 4, 3, 4**-0.5
        self.q_proj = nn.Linear(10, 24, bias=False)
        self.k_proj = nn.Linear(10, 8, bias=False)
        self.v_proj = nn.Linear(10, 8, bias=False)
        self.o_proj = nn.Linear(24, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, 4)).transpose(1, 2) for m in (self.q_proj, self.k_proj, self.v_proj))
        k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        share = (self.scaling * q @ k.mT).masked_fill(later, -torch.inf).softmax(-1)
        return self.o_proj((share @ v).transpose(1, 2).flatten(2))


class ClipLike(nn.Module):
    """Looks like a CLIP's attention: `out_proj`, biases, `num_heads`, and a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = 2, 0.3
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (2, 3)).transpose(1, 2) for m in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out_proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [True, False])
def test_multihead_attention_reads_as_it_computes(bias):
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True).eval(), torch.randn(2, 5, 8)
    if bias:  # they begin as zeros, which would hide a swap
        nn.init.normal_(module.in_proj_bias)
        nn.init.normal_(module.out_proj.bias)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = module(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(attention_of(module).apply(x, key_padding=padding), expected)


def test_multihead_attention_with_other_key_widths_reads_as_it_computes():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True).eval()
    x, keys, values = torch.randn(2, 4, 8), torch.randn(2, 6, 5), torch.randn(2, 6, 3)
    torch.testing.assert_close(attention_of(module).apply(x, keys, values), module(x, keys, values)[0])


def test_look_alikes_read_as_they_compute_and_mix():
    """A mixture of three equal look-alikes computes what one of them computes."""
    torch.manual_seed(0)
    for module, width, causal in ((LlamaLike(), 10, True), (ClipLike(), 6, False)):
        x, read = torch.randn(2, 5, width), attention_of(module)
        torch.testing.assert_close(read.apply(x, causal=causal), module(x))
        torch.testing.assert_close(SoftAttention.from_dense([read] * 3)(x, causal=causal), module(x))
    assert (attention_of(LlamaLike()).heads, attention_of(LlamaLike()).kv_heads, attention_of(ClipLike()).scale) == (6, 2, 0.3)
    module = LlamaLike()
    assert attention_of(module).q is module.q_proj.weight


def test_what_would_be_lost_is_refused():
    """A parameter or a rule without a place in `DenseAttention` stops the reading, with its name."""
    with pytest.raises(InvalidInput, match=r"no nn\.MultiheadAttention"):
        attention_of(nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match="add_zero_attn"):
        attention_of(nn.MultiheadAttention(4, 2, add_zero_attn=True))
    normed = LlamaLike()
    normed.q_norm = nn.RMSNorm(4)
    with pytest.raises(InvalidInput, match=r"q_norm\.weight"):
        attention_of(normed)
    capped = LlamaLike()
    capped.attn_logit_softcapping = 50.0
    with pytest.raises(InvalidInput, match="softcapping"):
        attention_of(capped)
    wrapped = LlamaLike()
    wrapped.v_proj = nn.Sequential(wrapped.v_proj)
    with pytest.raises(InvalidInput, match="v_proj is a Sequential"):
        attention_of(wrapped)
    nameless = ClipLike()
    del nameless.num_heads
    with pytest.raises(InvalidInput, match="divided among heads"):
        attention_of(nameless)
    learned = ClipLike()
    learned.scale = torch.ones(2)
    with pytest.raises(InvalidInput, match="scales its logits by a Tensor"):
        attention_of(learned)

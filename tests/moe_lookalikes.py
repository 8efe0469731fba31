"""Small blocks with the structure of well-known libraries' blocks: names, order of calls, and what lies around the FFN.

They are written from the libraries' documented structure, because some of these libraries replace torch here and cannot be installed.
Every model takes (B, N, 12) tokens (heads: (B, 12) or (B, 12, N)) and returns a tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D, H = 12, 20


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class TanhGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class Attention(nn.Module):
    """Four linear maps D -> D, as in most libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class Block(nn.Module):
    """Attention and FFN, each after a norm and beside a residual connection."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(D), Attention(), nn.LayerNorm(D), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """Two blocks and a head."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make(), make()])
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class LlamaMlp(nn.Module):
    """Llama, Mistral: gate, up, down without biases. `gate_first=False` swaps the order of registration, not the arithmetic."""

    def __init__(self, gate_first: bool = True, act: nn.Module | None = None) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj") if gate_first else ("up_proj", "gate_proj"):
            self.add_module(name, nn.Linear(D, H, bias=False))
        self.down_proj = nn.Linear(H, D, bias=False)
        self.act_fn = act or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ClipMlp(nn.Module):
    """CLIP, and ViT and SigLIP in newer versions."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.activation_fn = act or QuickGelu()
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class SwishGluFfn(nn.Module):
    """DINOv2's larger models: gate and up in one weight."""

    def __init__(self, gate_first: bool = True) -> None:
        super().__init__()
        self.weights_in, self.weights_out, self.gate_first = nn.Linear(D, 2 * H), nn.Linear(H, D), gate_first

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.weights_in(x).chunk(2, dim=-1)
        return self.weights_out(F.silu(a) * b if self.gate_first else a * F.silu(b))

    def extra_repr(self) -> str:
        return f"gate_first={self.gate_first}"


class Intermediate(nn.Module):
    """BERT and older ViT: the first linear map and the activation, which may be a function."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(D, H), F.gelu

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class BertOutput(nn.Module):
    """The second linear map, dropout, residual connection and norm."""

    def __init__(self, width: int = H) -> None:
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(width, D), nn.LayerNorm(D), nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class VitOutput(nn.Module):
    """Older ViT: no norm in the second module."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.dropout = nn.Linear(H, D), nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden_states)) + input_tensor


class BertSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": BertSelfAttention(), "output": BertOutput(D)})
        self.intermediate, self.output = Intermediate(), BertOutput()

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x), x)
        return self.output(self.intermediate(x), x)


class OldVitLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = Attention(), Intermediate(), VitOutput()
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return self.output(self.intermediate(self.layernorm_after(x)), x)


class TimmMlp(nn.Module):
    """timm's Mlp: dropout after the activation and after the last linear map, an optional norm between."""

    def __init__(self, *, norm: bool = False, conv: bool = False, drop: tuple[float, float] = (0.1, 0.2)) -> None:
        super().__init__()
        linear = (lambda a, b: nn.Conv2d(a, b, 1)) if conv else nn.Linear
        self.fc1, self.act, self.drop1 = linear(D, H), nn.GELU(), nn.Dropout(drop[0])
        self.norm = nn.LayerNorm(H) if norm else nn.Identity()
        self.fc2, self.drop2 = linear(H, D), nn.Dropout(drop[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class TimmSwiGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x, self.act = nn.Linear(D, H), nn.Linear(D, H), nn.SiLU()
        self.drop1, self.norm, self.fc2, self.drop2 = nn.Dropout(0.0), nn.Identity(), nn.Linear(H, D), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1_g(x)) * self.fc1_x(x)))))


class OpenClipBlock(nn.Module):
    """The FFN is a named chain, and the model asks its first layer for the type of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(D), Attention(), nn.LayerNorm(D)
        self.mlp = nn.Sequential()
        for name, layer in (("c_fc", nn.Linear(D, H)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(H, D))):
            self.mlp.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.mlp.c_fc.weight.dtype)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.2), nn.Parameter(torch.randn(nf) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={len(self.weight)}"


class Gpt2Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.act, self.dropout = Conv1D(H, D), Conv1D(D, H), TanhGelu(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class FunctionalMlp(nn.Module):
    """The activation is a call in the code: nothing of it can be seen from outside."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(D, H), nn.Linear(H, D), act

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


class ScaledMlp(nn.Module):
    """Has the layers of an FFN and is none: its hidden units are divided by their norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.normalize(F.relu(self.fc1(x)), dim=-1))


def region_head(c: int = 16, dropout: float = 0.3, norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    """A detector's branch: 1 x 1 convolutions with batch norm, ReLU and dropout, (B, 12, N) -> (B, 7, N)."""
    first = [nn.Conv1d(D, c, 1, bias=False), norm(c), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*first, nn.Conv1d(c, c, 1, bias=False), norm(c), nn.ReLU(), nn.Conv1d(c, 7, 1))


def linear_head() -> nn.Sequential:
    """Linear layers with batch norm, (B, 12) -> (B, 1)."""
    return nn.Sequential(nn.Linear(D, H, bias=False), nn.BatchNorm1d(H), nn.ReLU(), nn.Linear(H, 1))


def image_head() -> nn.Sequential:
    """1 x 1 convolutions on an image, the last ones in a chain of their own, (B, 12, h, w) -> (B, 5, h, w)."""
    return nn.Sequential(
        nn.Conv2d(D, D, 3, padding=1), nn.ReLU(), nn.Sequential(nn.Conv2d(D, H, 1), nn.GELU()), nn.Conv2d(H, 5, 1)
    )


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic random values, so that no zero and no one hides a fault."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                value = torch.randn(tensor.shape, generator=draw) * (0.3 if tensor.ndim > 1 else 0.2)
                tensor.copy_(value.abs() + 0.5 if name.endswith("running_var") else value + (tensor.ndim == 1) * 0.5)
    return model.eval()


def tokens(channels_first: int = 0, seed: int = 5) -> Tensor:
    """Inputs: (2, 3, 12), or (2, 12, 3) for 1 and (2, 12, 3, 3) for 2 dimensions behind the channels."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*((2, 3, D), (2, D, 3), (2, D, 3, 3))[channels_first], generator=draw)


class Named:
    """A model, its inputs, and what must be found in it."""

    def __init__(
        self, make: Callable[[], nn.Module], *, first: str, count: int, kind: str, act: str, gated: bool = False
    ) -> None:
        self.make, self.first, self.count, self.kind, self.act, self.gated = make, first, count, kind, act, gated
        self.dims = 0


def _encoder_layer(act: object = "relu", **more: object) -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, H, 0.1, act, batch_first=True, **more)  # type: ignore[arg-type]


class WithMemory(nn.Module):
    """A decoder that attends to its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 2, H, activation=F.gelu, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x, x)


def _channels(named: Named, dims: int) -> Named:
    named.dims = dims
    return named


MODELS: dict[str, Named] = {
    "torch-encoder": Named(
        lambda: nn.TransformerEncoder(_encoder_layer(), 2), first="layers.0.linear1", count=2, kind="layer", act="relu"
    ),
    # Without biases torch has no fused evaluation of the layer, which would compute the exact GELU in the place of every nn.GELU.
    "torch-encoder-module-activation": Named(
        lambda: nn.TransformerEncoder(
            _encoder_layer(nn.GELU("tanh"), norm_first=True, bias=False), 2, enable_nested_tensor=False
        ),
        first="layers.0.linear1",
        count=2,
        kind="layer",
        act="gelu_tanh",
    ),
    "torch-decoder": Named(WithMemory, first="decoder.layers.0.linear1", count=2, kind="layer", act="gelu"),
    "llama": Named(
        lambda: Stack(lambda: Block(LlamaMlp())), first="layers.0.mlp", count=2, kind="module", act="silu", gated=True
    ),
    "llama-up-first": Named(
        lambda: Stack(lambda: Block(LlamaMlp(gate_first=False))),
        first="layers.0.mlp",
        count=2,
        kind="module",
        act="silu",
        gated=True,
    ),
    "gemma": Named(
        lambda: Stack(lambda: Block(LlamaMlp(act=TanhGelu()))),
        first="layers.0.mlp",
        count=2,
        kind="module",
        act="gelu_tanh",
        gated=True,
    ),
    "clip": Named(lambda: Stack(lambda: Block(ClipMlp())), first="layers.0.mlp", count=2, kind="module", act="quick_gelu"),
    "vit-new": Named(lambda: Stack(lambda: Block(ClipMlp(nn.GELU()))), first="layers.0.mlp", count=2, kind="module", act="gelu"),
    "vit-old": Named(lambda: Stack(OldVitLayer), first="layers.0.intermediate", count=2, kind="pair", act="gelu"),
    "bert": Named(lambda: Stack(BertLayer), first="layers.0.intermediate", count=2, kind="pair", act="gelu"),
    "dinov2-giant": Named(
        lambda: Stack(lambda: Block(SwishGluFfn())), first="layers.0.mlp", count=2, kind="module", act="silu", gated=True
    ),
    "glu-second-half": Named(
        lambda: Stack(lambda: Block(SwishGluFfn(gate_first=False))),
        first="layers.0.mlp",
        count=2,
        kind="module",
        act="silu",
        gated=True,
    ),
    "timm": Named(lambda: Stack(lambda: Block(TimmMlp())), first="layers.0.mlp", count=2, kind="module", act="gelu"),
    "timm-swiglu": Named(
        lambda: Stack(lambda: Block(TimmSwiGlu())), first="layers.0.mlp", count=2, kind="module", act="silu", gated=True
    ),
    "timm-conv": _channels(
        Named(lambda: nn.Sequential(TimmMlp(conv=True), nn.Tanh()), first="0", count=1, kind="module", act="gelu"), 2
    ),
    "open-clip": Named(lambda: Stack(OpenClipBlock), first="layers.0.mlp.c_fc", count=2, kind="chain", act="gelu"),
    "gpt2": Named(lambda: Stack(lambda: Block(Gpt2Mlp())), first="layers.0.mlp", count=2, kind="module", act="gelu_tanh"),
    "functional": Named(
        lambda: Stack(lambda: Block(FunctionalMlp(F.silu))), first="layers.0.mlp", count=2, kind="module", act="silu"
    ),
    "region-head": _channels(Named(region_head, first="0", count=1, kind="chain", act="relu"), 1),
    "image-head": _channels(Named(image_head, first="2.0", count=1, kind="chain", act="gelu"), 2),
}
"""Models by name."""

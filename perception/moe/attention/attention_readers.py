"""Reads the dense attention out of a module, by the module's structure and not by its class.

Known structures are `nn.MultiheadAttention` and modules with four linear maps `q_proj`, `k_proj`, `v_proj` and `o_proj` or
`out_proj`, which is how the attentions of Llama, Mistral, CLIP, SigLIP and DINOv2 look in Hugging Face's library. No class of
that library is imported. Every parameter of the module must have a place in `DenseAttention`; a module with others is refused.

Read next: `soft_attention.py`, which mixes several attentions.
"""

from __future__ import annotations

from torch import Tensor, nn

from ....core.errors import InvalidInput
from .dense_attention import DenseAttention

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_OUTPUTS = ("o_proj", "out_proj")
_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_HEAD_WIDTHS = ("head_dim", "attention_head_size")
_SCALES = ("scaling", "scale")
_CHANGED_LOGITS = ("attn_logit_softcapping", "softcap", "logits_soft_cap")


def attention_of(module: nn.Module) -> DenseAttention:
    """Read the weights of an attention. They are shared with the module, not copied.

    Dropout, masks and positions belong to the call and are not read.

    Args:
        module: An `nn.MultiheadAttention`, or a module with the linear maps `q_proj`, `k_proj`, `v_proj` and `o_proj` or
            `out_proj`.

    Returns:
        The attention as a value.

    Raises:
        InvalidInput: The structure is unknown, the module has a parameter for which `DenseAttention` has no place, or it computes
            its logits in another way.
    """
    if isinstance(module, nn.MultiheadAttention):
        return _of_multihead(module)
    output = [name for name in _OUTPUTS if isinstance(getattr(module, name, None), nn.Module)]
    missing = [name for name in _PROJECTIONS if not isinstance(getattr(module, name, None), nn.Module)]
    if missing or len(output) != 1:
        found = ", ".join(name for name, _ in module.named_children()) or "none"
        raise InvalidInput(
            f"tried to read {type(module).__name__} as an attention: it is no nn.MultiheadAttention and has not the children "
            f"{', '.join(_PROJECTIONS)} and one of {', '.join(_OUTPUTS)} (its children: {found}); build a DenseAttention from its "
            "weights yourself"
        )
    return _of_projections(module, output[0])


def _of_multihead(module: nn.MultiheadAttention) -> DenseAttention:
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        raise InvalidInput(
            "an nn.MultiheadAttention with add_bias_kv or add_zero_attn attends to keys that are not in its input; such an "
            "attention cannot be read"
        )
    if module.in_proj_weight is not None:
        q, k, v = module.in_proj_weight.chunk(3)
    else:
        q, k, v = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    biases: tuple[Tensor | None, ...] = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return DenseAttention(
        q=q,
        k=k,
        v=v,
        o=module.out_proj.weight,
        q_bias=biases[0],
        k_bias=biases[1],
        v_bias=biases[2],
        o_bias=module.out_proj.bias,
        heads=module.num_heads,
        kv_heads=module.num_heads,
        head_dim=module.head_dim,
        scale=module.head_dim**-0.5,
    )


def _of_projections(module: nn.Module, output: str) -> DenseAttention:
    kind = type(module).__name__
    maps = {name: getattr(module, name) for name in (*_PROJECTIONS, output)}
    for name, linear in maps.items():
        if type(linear).forward is not nn.Linear.forward or not linear.weight.is_floating_point():
            raise InvalidInput(
                f"{kind}.{name} is a {type(linear).__name__}, which does not compute like nn.Linear; merge adapters and "
                "convert a quantized model to floating point first"
            )
    known = {f"{name}.{part}" for name in maps for part in ("weight", "bias")}
    for name, _ in module.named_parameters():
        if name not in known:
            raise InvalidInput(f"{kind} has the parameter {name!r}, for which a DenseAttention has no place; it would be lost")
    for name in _CHANGED_LOGITS:
        if getattr(module, name, None) is not None:
            raise InvalidInput(f"{kind} limits its logits ({name}), which a DenseAttention does not; it cannot be read")
    q, k = maps["q_proj"], maps["k_proj"]
    head_dim = _head_dim(module, q.out_features)
    scales = [value for name in _SCALES if (value := getattr(module, name, None)) is not None]
    if scales and not isinstance(scales[0], int | float):
        raise InvalidInput(f"{kind} scales its logits by a {type(scales[0]).__name__}; only one constant number can be read")
    return DenseAttention(
        q=q.weight,
        k=k.weight,
        v=maps["v_proj"].weight,
        o=maps[output].weight,
        q_bias=q.bias,
        k_bias=k.bias,
        v_bias=maps["v_proj"].bias,
        o_bias=maps[output].bias,
        heads=q.out_features // head_dim,
        kv_heads=k.out_features // head_dim,
        head_dim=head_dim,
        scale=float(scales[0]) if scales else head_dim**-0.5,
    )


def _head_dim(module: nn.Module, queries: int) -> int:
    """Width of one head, from the module or from its configuration: `head_dim`, else the number of heads."""
    for owner in (module, getattr(module, "config", None)):
        for name in _HEAD_WIDTHS:
            width = getattr(owner, name, None)
            if isinstance(width, int) and width >= 1 and queries % width == 0:
                return width
        for name in _HEADS:
            heads = getattr(owner, name, None)
            if isinstance(heads, int) and heads >= 1 and queries % heads == 0:
                return queries // heads
    names = ", ".join((*_HEAD_WIDTHS, *_HEADS))
    raise InvalidInput(
        f"{type(module).__name__} has {queries} query channels, and neither it nor its config says with {names} how they are "
        "divided among heads"
    )

"""Mixtures of Llama's and Mistral's blocks as real Hugging Face Mixtral models, and Mixtral models as mixtures of this package.

Mixtral's router is softmax, top k, renormalize, and every block has experts. A mixture of another kind is refused with the reason, because
the same weights under that rule are another model; `save_mixture` keeps it as it is.

| layout | names in the file | who reads it |
|---|---|---|
| `per_expert` | `model.layers.0.block_sparse_moe.experts.0.w1.weight` (w1 gate, w3 up, w2 down) | transformers 4 and 5, vLLM, llama.cpp |
| `fused` | `model.layers.0.mlp.experts.gate_up_proj` (E, 2 F, D), `...down_proj` (E, D, F) | transformers 5 |

transformers is imported inside the functions, so the package does not need it. Read next: `transformers_experts.py`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_numbers
from ....core.files import write_atomically
from ..layers.bank import BankShape, ExpertBank
from ..layers.moe_ffn import MoeFfn, moe_layers
from ..layers.routers import TopKRouter
from ..layers.routing import TopKRule
from ..surgery.tensor_account import TensorAccount, TensorLedger
from ..upcycling.upcyclers import saved_tensors
from .transformers_package import transformers_package, without_progress_bars

MixtralLayout = Literal["per_expert", "fused"]
"""How the experts lie in the files: one tensor per expert and map, or all experts stacked."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""Files of a tokenizer in a model's folder."""
EXPERTS_NAME = "experts.json"
"""File beside a Mixtral with a list of its experts' names, for which its own files have no place."""
_CARD = """# A Mixtral model upcycled from a dense {source}

| routing that was evaluated | |
|---|---|
| experts per block | {experts} |
| active experts per token | {k} |
| score | softmax over all experts, the k largest, divided by their sum |
| coefficient of the balance loss in `config.json` | {coefficient:g}, {balance_note} |
| layout of the files | {layout} |

Written by upcycle3d. Another number of active experts is another model: evaluate it before you change `num_experts_per_tok`.
"""


@dataclass(frozen=True, kw_only=True)
class SavedMixtral:
    """What was written."""

    folder: Path
    """The folder."""
    account: TensorAccount
    """What became of every tensor."""
    files: tuple[str, ...]
    """Names of the files."""


def to_mixtral(model: nn.Module, *, balance: float = 0.0) -> tuple[Any, TensorAccount]:
    """Make a Hugging Face `MixtralForCausalLM` of an upcycled Llama or Mistral. Every tensor is written once, or it is an error.

    Args:
        model: A `LlamaForCausalLM` or `MistralForCausalLM` whose every FFN is a `MoeFfn` with a renormalized top-k router; or a Mixtral
            after `mixtral_as_mixture`.
        balance: Coefficient of the balance loss for further training there, in this package's measure (1 for a uniform router). The
            library's own uniform value is k, so its coefficient becomes `balance` / k. Above 0 the library's router logits are turned on,
            without which it leaves the loss out and does not say so.

    Returns:
        The Mixtral model in evaluation mode, with weights of its own, and the account.

    Raises:
        InvalidInput: transformers is not installed, or the model cannot be a Mixtral; the message names the first thing that does not fit.
    """
    library = transformers_package()
    require_numbers("to_mixtral", least=0.0, most=1e6, balance=balance)
    layers, rule = _checked(model)
    source: Any = model.config
    config = library.MixtralConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads,
        hidden_act=source.hidden_act,
        max_position_embeddings=source.max_position_embeddings,
        initializer_range=source.initializer_range,
        rms_norm_eps=source.rms_norm_eps,
        pad_token_id=source.pad_token_id,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        tie_word_embeddings=source.tie_word_embeddings,
        sliding_window=getattr(source, "sliding_window", None),
        attention_dropout=source.attention_dropout,
        num_experts_per_tok=rule.k,
        num_local_experts=layers[0].bank.shape.experts,
        output_router_logits=balance > 0,
        router_aux_loss_coef=balance / rule.k,
        rope_parameters=dict(source.rope_parameters),
    )
    dtype = layers[0].bank.down_proj.dtype
    made = library.MixtralForCausalLM(config).to(dtype).eval()
    target, tensors = saved_tensors(made), saved_tensors(model)
    with torch.no_grad():
        for tensor in target.values():
            tensor.fill_(float("nan"))
    ledger = TensorLedger([tensors], target)
    for name in target:
        ledger.write(name, ledger.read(0, _source_name(name), _kind(name)), _kind(name))
    return made, ledger.close()


def _source_name(name: str) -> str:
    """Name of a Mixtral's tensor in our mixture."""
    for theirs, ours in ((".mlp.experts.", ".mlp.bank."), (".mlp.gate.", ".mlp.router.")):
        name = name.replace(theirs, ours)
    return name


def _kind(name: str) -> str:
    return "experts" if ".experts." in name else "router" if ".mlp.gate." in name else "kept"


def _checked(model: nn.Module) -> tuple[list[MoeFfn], TopKRule]:
    """The mixtures of a model that Mixtral can express, and their one rule."""
    require_mixtral_base(model)
    layers = dict(moe_layers(model))
    found: list[MoeFfn] = []
    for number, block in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        name = f"model.layers.{number}"
        layer = layers.get(f"{name}.mlp")
        if layer is None:
            raise InvalidInput(
                f"{name}.mlp is dense, and a Mixtral has experts in every block; upcycle all blocks, or use save_mixture"
            )
        if type(block.self_attn).__name__ not in ("LlamaAttention", "MistralAttention", "MixtralAttention"):
            raise InvalidInput(f"{name}.self_attn is a mixture of attentions, which Mixtral does not have; use save_mixture")
        _check_layer(name, layer, found[0] if found else None)
        found.append(layer)
    rule = found[0].router.rule
    assert isinstance(rule, TopKRule)
    return found, rule


def require_mixtral_base(model: nn.Module) -> None:
    """Refuse a dense model of which no Mixtral can be made, before anything is computed.

    Args:
        model: The dense model, or a mixture that was made of it.

    Raises:
        InvalidInput: It is no Llama or Mistral, or its attentions have biases.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ("llama", "mistral", "mixtral"):
        raise InvalidInput(
            f"only an upcycled Llama or Mistral can become a Mixtral, found {type(model).__name__} of type {kind!r}; keep it with "
            "save_mixture"
        )
    if getattr(config, "attention_bias", False):
        raise InvalidInput("the attentions have biases, and Mixtral's have none; keep the model with save_mixture")


def _check_layer(name: str, layer: MoeFfn, first: MoeFfn | None) -> None:
    router = layer.router
    if not isinstance(router, TopKRouter):
        raise InvalidInput(f"the router of {name} is a {type(router).__name__}; Mixtral's chooses the top k. Use save_mixture")
    rule = router.rule
    if rule.norm != "renorm" or rule.score != "softmax" or router.bias is not None:
        raise InvalidInput(
            f"the router of {name} has norm {rule.norm!r}, score {rule.score!r} and {'a' if router.bias is not None else 'no'} bias; "
            "Mixtral's divides the k largest softmax scores by their sum and has no bias, so it would compute another model. Use "
            "save_mixture, or train with TopKRule(k=..., norm='renorm')"
        )
    shape = layer.bank.shape
    if not shape.gated or shape.hidden_bias or shape.out_bias:
        raise InvalidInput(f"the experts of {name} need a gate and no biases to be Mixtral's, found {shape}")
    if first is not None and (first.bank.shape != shape or getattr(first.router, "rule", None) != rule):
        raise InvalidInput(f"{name} has {shape} and {rule}, and the first block other ones; Mixtral has one form for all")


def save_as_mixtral(
    model: nn.Module,
    folder: str | Path,
    *,
    layout: MixtralLayout = "per_expert",
    balance: float = 0.0,
    tokenizer_from: str | Path | None = None,
    experts: Sequence[str] = (),
) -> SavedMixtral:
    """Write an upcycled Llama or Mistral as a folder that `MixtralForCausalLM.from_pretrained` loads. Nothing is written on an error.

    Args:
        model: As for `to_mixtral`.
        folder: The folder; it must not exist, or be empty.
        layout: Names of the experts' tensors, see the table above.
        balance: As for `to_mixtral`.
        tokenizer_from: Folder of the dense model, whose tokenizer files are copied; None for no tokenizer.
        experts: Names of the experts, in order. They go into `experts.json`, which only this package reads.

    Returns:
        What was written. Every tensor was read back from the files and compared bit by bit.

    Raises:
        InvalidInput: As for `to_mixtral`, or the folder is not empty, or what was read back differs.
        OSError: The folder cannot be written.

    Example:
        made = sparse_copy(llama, plan_replacement(llama, experts=4), RandomRouters(experts=4, rule=TopKRule(k=2, norm="renorm")))
        save_as_mixtral(made.model, "mixtral", tokenizer_from="smollm2")
    """
    require(layout in get_args(MixtralLayout), f"layout must be one of {', '.join(get_args(MixtralLayout))}, found {layout!r}")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidInput(f"{target} exists and is not an empty folder; give another one")
    made, account = to_mixtral(model, balance=balance)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        work = Path(temporary) / "model"
        with without_progress_bars():
            made.save_pretrained(work, save_original_format=layout == "per_expert")
        _require_equal_files(work, saved_tensors(made), layout, tied=bool(made.config.tie_word_embeddings))
        for name in TOKENIZER_FILES if tokenizer_from is not None else ():
            found = Path(str(tokenizer_from)) / name
            if found.is_file():
                shutil.copyfile(found, work / name)
        note = "so the loss is off" if not balance else f"which is {balance:g} where a uniform router counts as 1"
        card = _CARD.format(
            source=type(model).__name__,
            experts=made.config.num_local_experts,
            k=made.config.num_experts_per_tok,
            coefficient=made.config.router_aux_loss_coef,
            balance_note=note,
            layout=layout,
        )
        write_atomically(work / "README.md", card.encode())
        if experts:
            write_atomically(work / EXPERTS_NAME, json.dumps(list(experts)).encode())
        if target.exists():
            target.rmdir()
        work.rename(target)
    return SavedMixtral(folder=target, account=account, files=tuple(sorted(path.name for path in target.iterdir())))


def _require_equal_files(folder: Path, wanted: Mapping[str, Tensor], layout: MixtralLayout, *, tied: bool) -> None:
    """Read every tensor of the files, and account for it: each is expected once, and each expected one is there."""
    left = {name: tensor for name, tensor in _in_files(wanted, layout).items() if not (tied and name == "lm_head.weight")}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                if name == "lm_head.weight" and tied:
                    continue
                if name not in left:
                    raise InvalidInput(f"the written folder holds {name!r}, which the model does not have, or holds twice")
                if not torch.equal(file.get_tensor(name), left.pop(name)):
                    raise InvalidInput(f"the tensor {name!r} was written with other values than the model has")
    if left:
        raise InvalidInput(f"{len(left)} tensors were not written, first {next(iter(left))!r}")


def _in_files(tensors: Mapping[str, Tensor], layout: MixtralLayout) -> dict[str, Tensor]:
    """The tensors of a Mixtral by their names in the files."""
    if layout == "fused":
        return dict(tensors)
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block = name.replace(".mlp.", ".block_sparse_moe.")
        stem = block.rpartition(".")[0]
        if name.endswith(".experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                named[f"{stem}.{expert}.w1.weight"], named[f"{stem}.{expert}.w3.weight"] = gate, up
        elif name.endswith(".experts.down_proj"):
            named |= {f"{stem}.{expert}.w2.weight": down for expert, down in enumerate(tensor)}
        else:
            named[block if ".mlp." in name else name] = tensor
    return named


def mixtral_as_mixture(mixtral: nn.Module) -> tuple[str, ...]:
    """Put `MoeFfn` in the place of a Mixtral's blocks of experts: usage, losses, freezing and reports of this package then work on it.

    Args:
        mixtral: A `MixtralForCausalLM` or `MixtralModel`. It is changed; the weights are shared, and outputs are the same. Its own balance
            loss is turned off, because it reads routers that are gone: use `router_losses`.

    Returns:
        Names of the blocks that were replaced.

    Raises:
        InvalidInput: There is no such block, or its activation is not silu.
    """
    names = []
    for name, module in list(mixtral.named_modules()):
        if type(module).__name__ != "MixtralSparseMoeBlock":
            continue
        block: Any = module
        config: Any = mixtral.config
        require(config.hidden_act == "silu", f"the experts of {name} use {config.hidden_act!r}; only silu is known here")
        experts, hidden_twice, width = block.experts.gate_up_proj.shape
        shape = BankShape(
            experts=experts,
            width_in=width,
            width_hidden=hidden_twice // 2,
            width_out=width,
            activation="silu",
            gated=True,
            hidden_bias=False,
            out_bias=False,
        )
        with torch.device("meta"):
            bank = ExpertBank(shape)
            router = TopKRouter(width, experts, TopKRule(k=int(block.gate.top_k), norm="renorm"))
        bank.gate_up_proj, bank.down_proj, router.weight = block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight
        mixtral.set_submodule(name, MoeFfn(bank, router).train(module.training), strict=True)
        names.append(name)
    if hasattr(mixtral.config, "output_router_logits"):
        mixtral.config.output_router_logits = False
    require(bool(names), f"{type(mixtral).__name__} has no block of Mixtral's experts")
    return tuple(names)

"""Language models on disk: Hugging Face folders of Llama, Mistral and Mixtral, and folders with a mixture of this package.

transformers is imported inside the functions. Nothing is ever downloaded. Read next: `language_upcycling.py`, which upcycles them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, UpcycleError, require
from ....core.foreign_text import check_name, shown
from ....core.text_files import read_text
from ..checkpoints.checkpoint import BaseModel, MixtureDescription, load_mixture, save_mixture
from ..checkpoints.mixtral import EXPERTS_NAME, TOKENIZER_FILES, mixtral_as_mixture
from ..checkpoints.transformers_package import load_whole, stored_config, transformers_package, without_progress_bars
from ..layers.moe_ffn import moe_layers
from ..upcycling.upcyclers import Upcycled

MIXTURE_NAME = "mixture.safetensors"
"""Name of the file with a mixture inside its folder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """A model with its tokenizer."""

    model: nn.Module
    """The model in evaluation mode: `model(ids).logits`."""
    tokenizer: Any
    """The tokenizer of the folder."""
    folder: Path
    """Where both come from."""
    experts: tuple[str, ...] = ()
    """Names of a mixture's experts, in order; none where they have only numbers."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows."""
        model: Any = self.model
        return int(model.get_input_embeddings().num_embeddings)

    def tokens(self, path: Path) -> Tensor:
        """Read a text file as tokens.

        Args:
            path: A text file.

        Returns:
            (T,) int64.

        Raises:
            InvalidInput: It cannot be read, holds fewer than two tokens, or has tokens that the model does not know.
        """
        found = torch.tensor(self.tokenizer(read_text(path, "text"), add_special_tokens=False).input_ids)
        require(len(found) > 1, f"the text {path} has {len(found)} tokens; give a longer one")
        last = int(found.max())
        require(
            last < self.vocabulary,
            f"the tokenizer in {self.folder} makes token {last} of {path}, and the model knows {self.vocabulary}; they do not fit together",
        )
        return found.long()


def load_language_model(folder: str | Path, *, tokenizer: bool = True) -> LanguageModel:
    """Load a dense model, a Mixtral, or a mixture of this package.

    Args:
        folder: A Hugging Face folder, or one with `mixture.safetensors`.
        tokenizer: Whether to load the tokenizer, too.

    Returns:
        The model in float32. A Mixtral's blocks of experts have become `MoeFfn`, with the same weights and outputs.

    Raises:
        InvalidInput: There is no model, it is quantized, or it is damaged.
    """
    library = transformers_package()
    path = Path(folder)
    require_model_folder(path)
    mixture = path / MIXTURE_NAME
    experts: tuple[str, ...] = ()
    try:
        if mixture.is_file():
            loaded = load_mixture(mixture, _dense_of)
            model, experts = loaded.model, loaded.description.experts
        else:
            _require_kind(library, path)
            model = load_whole(library.AutoModelForCausalLM, path)
            config: Any = model.config
            if getattr(config, "quantization_config", None) is not None:
                raise InvalidInput(
                    f"the model in {path} is quantized; convert it to floating-point weights before it is upcycled"
                )
            if config.model_type == "mixtral":
                mixtral_as_mixture(model)
                experts = _stored_names(path, model)
    except UpcycleError:
        raise
    except Exception as error:  # a foreign library's loader raises anything
        raise InvalidInput(f"the model in {path} cannot be loaded: {type(error).__name__}: {shown(error)}") from error
    return LanguageModel(
        model=model.eval(), tokenizer=_tokenizer(library, path) if tokenizer else None, folder=path, experts=experts
    )


def require_model_folder(folder: Path) -> None:
    """Refuse a folder without a model, before anything is loaded.

    Args:
        folder: A Hugging Face folder, or one with `mixture.safetensors`.

    Raises:
        InvalidInput: It is missing, or has no model in it; the message names a model in the folder `model` inside, if there is one.
    """
    if holds_model(folder):
        return
    inside = f"; did you mean {folder / 'model'}?" if holds_model(folder / "model") else ""
    found = f"it has neither config.json (Hugging Face) nor {MIXTURE_NAME}" if folder.is_dir() else "there is no such folder"
    raise InvalidInput(f"{folder} holds no model: {found}{inside}")


def holds_model(folder: Path) -> bool:
    """Tell whether a folder looks like one with a language model.

    Args:
        folder: Any path.

    Returns:
        Whether a configuration or a mixture is there.
    """
    return (folder / MIXTURE_NAME).is_file() or (folder / "config.json").is_file()


def _require_kind(library: Any, folder: Path) -> None:
    """Refuse a Hugging Face model that is no language model, in words that are not the library's list of all its classes."""
    path = folder / "config.json"
    try:
        stored = json.loads(read_text(path, "configuration of a model"))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is damaged ({shown(error)}); copy the folder again from its source") from error
    kind = stored.get("model_type") if isinstance(stored, dict) else None
    if kind not in library.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InvalidInput(
            f"{folder} holds a model of type {shown(kind)!r}, which is no language model; give the folder of a Llama, a Mistral or a Mixtral"
        )


def _tokenizer(library: Any, folder: Path) -> Any:
    try:
        with without_progress_bars():
            return library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a foreign library's loader raises anything
        raise InvalidInput(
            f"the tokenizer in {folder} cannot be loaded ({type(error).__name__}: {shown(error)}); copy tokenizer.json and "
            "tokenizer_config.json of the model into the folder"
        ) from error


def _stored_names(folder: Path, model: nn.Module) -> tuple[str, ...]:
    """Names of a Mixtral's experts. They only label tables, so a file that does not fit is as good as none."""
    if not (folder / EXPERTS_NAME).is_file():
        return ()
    try:
        names = json.loads(read_text(folder / EXPERTS_NAME, "names of experts"))
    except (ValueError, RecursionError, InvalidInput):
        return ()
    counts = {layer.bank.shape.experts for _, layer in moe_layers(model)}
    fits = isinstance(names, list) and counts == {len(names)} and all(isinstance(name, str) for name in names)
    return tuple(names) if fits else ()


def _dense_of(description: MixtureDescription) -> nn.Module:
    """Build the dense model of a mixture from the stored configuration; its weights come from the file."""
    library = transformers_package()
    base = description.base
    if base is None or base.library != "transformers":
        raise InvalidInput("the mixture was stored without the configuration of its dense model; load it with load_mixture")
    if base.model_class not in library.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise InvalidInput(f"transformers has no language model {shown(base.model_class)!r}, of which the mixture was made")
    kind: Any = getattr(library, base.model_class)
    made: nn.Module = kind(stored_config(kind.config_class, base.config))
    return made


def save_language_mixture(
    folder: str | Path, upcycled: Upcycled, source: LanguageModel, *, note: str = "", experts: Sequence[str] = ()
) -> MixtureDescription:
    """Write a mixture as `mixture.safetensors`, with the tokenizer of its dense model beside it.

    Args:
        folder: The folder; it is made where needed.
        upcycled: The mixture with its plans.
        source: The dense model it was made of.
        note: How it was trained and evaluated.
        experts: Names of the experts, in order.

    Returns:
        What the file says about the model.

    Raises:
        InvalidInput: The result is dense, or cannot be stored.
        OSError: The folder cannot be written.
    """
    plan = upcycled.plan
    if plan is None:
        raise InvalidInput("a dense result has no mixture to store; write it with its own save_pretrained")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    config: Any = source.model.config
    base = BaseModel(
        library="transformers", model_class=type(upcycled.model).__name__, config=config.to_json_string(use_diff=False)
    )
    said = save_mixture(
        target / MIXTURE_NAME, upcycled.model, plan, base=base, note=note, attentions=upcycled.attentions, experts=experts
    )
    copy_tokenizer(source.folder, target)
    return said


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer.

    Args:
        source: A model's folder.
        target: Another one.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def named_texts(words: Sequence[str]) -> Mapping[str, Path]:
    """Read options of the form NAME=FILE.

    Args:
        words: The options.

    Returns:
        File of each name, in order.

    Raises:
        InvalidInput: One has no name, two have the same, a name cannot be the name of a folder, or a file is missing.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            raise InvalidInput(
                f"texts are given as NAME=FILE, found {word!r}; write {Path(word).stem or 'code'}={word or 'code.txt'}"
            )
        if name in found:
            raise InvalidInput(f"two texts have the name {name!r}: {found[name]} and {path}; give them different names")
        found[check_name(name, "name of a text, which becomes that of a folder")] = Path(path)
    for name, file in found.items():
        require(file.exists() and not file.is_dir(), f"there is no file {file}, which --texts gives as {name!r}; check the path")
    return found

"""Language models on disk: Hugging Face folders of Llama, Mistral and Mixtral, and folders with a mixture of this package.

transformers is imported inside the functions. Nothing is ever downloaded. Read next: `language_upcycling.py`, which upcycles them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, UpcycleError, require, require_counts
from ....core.foreign_text import check_name, shown
from ....core.text_files import read_text
from ..checkpoints.checkpoint import BaseModel, MixtureDescription, load_mixture, save_mixture
from ..checkpoints.mixtral import TOKENIZER_FILES, mixtral_as_mixture
from ..checkpoints.transformers_package import load_whole, stored_config, transformers_package
from ..upcycling.upcyclers import Upcycled
from .text_training import mean_loss, next_token_loss

MIXTURE_NAME = "mixture.safetensors"
"""Name of the file with a mixture inside its folder."""


_ROW = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """A model with its tokenizer."""

    model: nn.Module
    """The model in evaluation mode: `model(ids).logits`."""
    tokenizer: Any
    """The tokenizer of the folder."""
    folder: Path
    """Where both come from."""

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
    mixture = path / MIXTURE_NAME
    if not mixture.is_file() and not (path / "config.json").is_file():
        raise InvalidInput(f"{path} holds no model: it has neither config.json (Hugging Face) nor {MIXTURE_NAME}")
    try:
        if mixture.is_file():
            model = load_mixture(mixture, _dense_of).model
        else:
            model = load_whole(library.AutoModelForCausalLM, path)
            config: Any = model.config
            if getattr(config, "quantization_config", None) is not None:
                raise InvalidInput(
                    f"the model in {path} is quantized; convert it to floating-point weights before it is upcycled"
                )
            if config.model_type == "mixtral":
                mixtral_as_mixture(model)
        words = library.AutoTokenizer.from_pretrained(path, local_files_only=True) if tokenizer else None
    except UpcycleError:
        raise
    except Exception as error:  # a foreign library's loader raises anything
        raise InvalidInput(f"the model in {path} cannot be loaded: {type(error).__name__}: {shown(error)}") from error
    return LanguageModel(model=model.eval(), tokenizer=words, folder=path)


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


def save_language_mixture(folder: str | Path, upcycled: Upcycled, source: LanguageModel, *, note: str = "") -> MixtureDescription:
    """Write a mixture as `mixture.safetensors`, with the tokenizer of its dense model beside it.

    Args:
        folder: The folder; it is made where needed.
        upcycled: The mixture with its plans.
        source: The dense model it was made of.
        note: How it was trained and evaluated.

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
    said = save_mixture(target / MIXTURE_NAME, upcycled.model, plan, base=base, note=note, attentions=upcycled.attentions)
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


def score_texts(
    tests: Mapping[str, Tensor], *, length: int | None = None, most: int = 16
) -> dict[str, Callable[[nn.Module], float]]:
    """Make what measures a model on texts, as `report_on` takes it.

    Args:
        tests: (T,) tokens of each domain.
        length: As for `perplexity`.
        most: As for `perplexity`.

    Returns:
        For each domain, what gives a model's perplexity.
    """

    def one(tokens: Tensor) -> Callable[[nn.Module], float]:
        return lambda model: perplexity(model, tokens, length=length, most=most)

    return {name: one(tokens) for name, tokens in tests.items()}


def longest_row(model: nn.Module) -> int:
    """Find the largest number of tokens in a row that a model was made for.

    Args:
        model: The model.

    Returns:
        The number of positions in its configuration; 2**24 where it names none.
    """
    return int(getattr(getattr(model, "config", None), "max_position_embeddings", None) or 2**24)


def check_row(model: nn.Module, length: int) -> None:
    """Refuse rows that are longer than a model was made for: learned positions end there, and computed ones give silently worse results.

    Args:
        model: The model.
        length: Tokens per row.

    Raises:
        InvalidInput: The rows are too long.
    """
    longest = longest_row(model)
    require(
        length <= longest, f"rows of {length} tokens are longer than the model's {longest} positions; lower the length (--length)"
    )


def perplexity(model: nn.Module, tokens: Tensor, *, length: int | None = None, most: int = 16) -> float:
    """Compute the perplexity of a text in rows of equal length, each read from its own start.

    Args:
        model: The model.
        tokens: (T,) tokens.
        length: Tokens per row; a shorter text is one row. None takes 512, or as many as the model has positions.
        most: Largest number of rows, spread over the text.

    Returns:
        Exponential of the mean loss per predicted token.

    Raises:
        InvalidInput: A row has fewer than two tokens or more than the model has positions, or there is none.
    """
    length = min(_ROW, longest_row(model)) if length is None else length
    check_row(model, length)
    require_counts("perplexity", least=2, most=2**24, length=length, tokens=len(tokens))
    require_counts("perplexity", most=2**24, rows=most)
    length = min(length, len(tokens))
    count = max(1, min(most, len(tokens) // length))
    starts = torch.linspace(0, len(tokens) - length, count).long()
    rows = [tokens[start : start + length][None] for start in starts]
    loss = mean_loss(model, rows, lambda m, ids: next_token_loss(m(ids).logits, ids))
    return float(torch.tensor(loss, dtype=torch.float64).exp())  # infinite or NaN for a wrecked model, where math.exp raises


def named_texts(words: Sequence[str]) -> Mapping[str, Path]:
    """Read options of the form NAME=FILE.

    Args:
        words: The options.

    Returns:
        File of each name, in order.

    Raises:
        InvalidInput: One has no name, two have the same, or a name cannot be the name of a folder.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not name or not path or name in found:
            raise InvalidInput(f"texts are given as NAME=FILE with different names, found {word!r}")
        found[check_name(name, "name of a text, which becomes that of a folder")] = Path(path)
    return found

"""The optional package transformers: loaded when a Hugging Face model is, and refused with advice where it is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ....core.errors import InvalidInput
from ....core.foreign_text import shown
from ....core.tensor_file import listed, not_finite


def transformers_package() -> Any:
    """Import transformers, which never looks for a network here: models are read from folders.

    Returns:
        The package.

    Raises:
        InvalidInput: It is not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise InvalidInput(
            "Hugging Face models need the package transformers, which is not installed; "
            "run in the toolkit's folder: pip install -c constraints.txt -e '.[moe]'"
        ) from error
    return transformers


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep the library's progress bars out of the output of this program, and give the user's setting back afterwards.

    Yields:
        Nothing.

    Raises:
        InvalidInput: transformers is not installed.
    """
    setting = transformers_package().utils.logging
    shows = setting.is_progress_bar_enabled()
    setting.disable_progress_bar()
    try:
        yield
    finally:
        if shows:
            setting.enable_progress_bar()


def load_whole(kind: Any, folder: str | Path) -> nn.Module:
    """Load a Hugging Face model whose files hold exactly the weights that its configuration describes.

    The library draws weights that are missing at random, leaves out those that have no place, and goes on.

    Args:
        kind: Class of the library, such as `AutoModelForCausalLM`.
        folder: A local folder with `config.json` and the weights.

    Returns:
        The model in float32.

    Raises:
        InvalidInput: The folder cannot be loaded, its weights are not those of its configuration, or they hold NaN or inf.
    """
    advice = "copy the folder again from its source, or correct its config.json"
    if not any(True for form in ("*.safetensors", "*.bin") for _ in Path(folder).glob(form)):
        raise InvalidInput(f"{folder} has a config.json and no weights (model.safetensors); {advice}")
    try:
        with without_progress_bars():
            model, told = kind.from_pretrained(
                str(folder), local_files_only=True, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except SafetensorError as error:
        raise InvalidInput(f"the weights in {folder} are damaged or not complete ({shown(error)}); {advice}") from error
    except Exception as error:  # a foreign library's loader raises anything
        raise InvalidInput(f"cannot load a {kind.__name__} from {folder}: {type(error).__name__}: {shown(error)}") from error
    faults = {
        "lack": told["missing_keys"],
        "also hold": told["unexpected_keys"],
        "have other shapes of": {str(name[0]) for name in told["mismatched_keys"]},
    }
    for what, names in faults.items():
        if names:
            raise InvalidInput(f"the weights in {folder} {what} {', '.join(listed(sorted(names), 3))}; {advice}")
    made: nn.Module = model
    bad = not_finite(made.state_dict())
    if bad:
        raise InvalidInput(
            f"the weights in {folder} hold NaN or inf in {', '.join(listed(bad, 3))}; use another copy of the model"
        )
    return made


def stored_config(kind: Any, text: str) -> Any:
    """Build a configuration of the library from the JSON text of a file, which may come from elsewhere.

    Args:
        kind: Class of the configuration.
        text: JSON text, as `to_json_string` writes it.

    Returns:
        The configuration. Names of implementations are left out: the library would look for code of that name.

    Raises:
        InvalidInput: The text is no JSON object.
    """
    try:
        data = json.loads(text, object_hook=lambda read: {k: v for k, v in read.items() if not k.endswith("_implementation")})
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the stored configuration is no JSON: {shown(error)}") from error
    if not isinstance(data, dict):
        raise InvalidInput(f"the stored configuration must be a JSON object, found {type(data).__name__}")
    return kind.from_dict(data)

"""The optional package transformers: loaded when a Hugging Face model is, and refused with advice where it is missing."""

from __future__ import annotations

import os
from typing import Any

from ....core.errors import InvalidInput


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

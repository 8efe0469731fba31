"""The tokenizer of a Hugging Face folder as a `TextCoder`. transformers is imported when one is made.

Read next: `text_stream.py`, which uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....core.errors import InvalidInput
from ....core.foreign_text import shown
from ..checkpoints.transformers_package import transformers_package


class HuggingFaceCoder:
    """A tokenizer of the library.

    Example:
        coder = HuggingFaceCoder("model")
        coder.decode(coder.encode("Once upon a time"))
    """

    def __init__(self, folder: str | Path) -> None:
        """Load the tokenizer.

        Args:
            folder: A folder with the files of a tokenizer. Nothing is downloaded.

        Raises:
            InvalidInput: transformers is not installed, or the folder has no tokenizer.
        """
        library = transformers_package()
        try:
            self._words: Any = library.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # a foreign library's loader raises anything
            raise InvalidInput(
                f"the tokenizer in {folder} cannot be loaded: {type(error).__name__}: {shown(error)}; copy the files of the dense "
                "model's tokenizer there"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Turn a text into tokens.

        Args:
            text: The text.

        Returns:
            Its tokens, without special ones, as the models of this package are trained and scored.
        """
        found: list[int] = self._words(text, add_special_tokens=False).input_ids
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Turn tokens into text.

        Args:
            ids: The tokens.

        Returns:
            Their text, without special tokens.
        """
        made: str = self._words.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return made

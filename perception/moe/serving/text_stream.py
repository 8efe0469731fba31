"""Tokens as text while they are generated: nothing is sent that a later token could change or a stop string could take back.

A token may be a part of a letter, so bytes without an end wait for the next token. A text whose end may become a stop string waits, too.
Read next: `llama_engine.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ....core.errors import require

_HALF = "\ufffd"
"""What tokenizers write for bytes that are no letter yet."""
_KEPT = 6
"""Tokens before the new ones that are decoded with them: tokenizers put spaces between tokens by what stands before."""
_LONGEST_LETTER = 8
"""Tokens without a complete letter after which the text is sent as it is."""


class TextCoder(Protocol):
    """A tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Turn a text into tokens.

        Args:
            text: The text.

        Returns:
            Its tokens, without special ones.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Turn tokens into text.

        Args:
            ids: The tokens.

        Returns:
            Their text, without special tokens.
        """
        ...


class TextStream:
    """The text of one request, token by token.

    Example:
        stream = TextStream(coder, stop=("END",))
        for token in tokens:
            print(stream.add(token), end="")
        print(stream.rest())
    """

    def __init__(self, coder: TextCoder, *, stop: Sequence[str] = ()) -> None:
        """Begin with nothing.

        Args:
            coder: The tokenizer.
            stop: Texts that end the text; they are not part of it.

        Raises:
            InvalidInput: A stop string is empty.
        """
        require(all(stop), "a stop string must not be empty")
        self._coder, self._stop = coder, tuple(stop)
        self._ids: list[int] = []
        self._begin = self._read = 0  # tokens from `_begin` on are decoded, and those before `_read` are text already
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token.

        Args:
            token: The token.

        Returns:
            Text that can be sent now, often with a delay of some letters. Nothing comes after a stop string.
        """
        if self.stopped:
            return ""
        self._ids.append(token)
        self._decode(least=False)
        found = [place for word in self._stop if (place := self._held.find(word)) >= 0]
        if found:
            self.stopped = True
            sent, self._held = self._held[: min(found)], ""
            return sent
        keep = max((_overlap(self._held, word) for word in self._stop), default=0)
        cut = len(self._held) - keep
        sent, self._held = self._held[:cut], self._held[cut:]
        return sent

    def rest(self) -> str:
        """Give what was held back, after the last token.

        Returns:
            The rest of the text.
        """
        if self.stopped:
            return ""
        self._decode(least=True)
        sent, self._held = self._held, ""
        return sent

    def _decode(self, *, least: bool) -> None:
        """Move text of complete letters to `_held`; with `least` also what is incomplete."""
        old = self._coder.decode(self._ids[self._begin : self._read])
        new = self._coder.decode(self._ids[self._begin :])
        waiting = len(self._ids) - self._read
        if not waiting or (new.endswith(_HALF) and not least and waiting < _LONGEST_LETTER):
            return
        self._held += new[len(old) :]
        self._read = len(self._ids)
        self._begin = max(0, self._read - _KEPT)


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of a text that a word begins with, the whole word left out."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:size])), 0)

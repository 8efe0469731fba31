"""What a completion request says and what it is answered with: the JSON of OpenAI's `/v1/completions`, without any server.

A field that this server does not know, or a value that it cannot obey, is an error that names it. A request that is answered as if a field
had been obeyed would be worse. Read next: `completions.py`, the endpoints.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....core.errors import InvalidInput, require
from ....core.foreign_text import shown
from ....core.strict_json import strict_json
from .http_errors import UnknownModel
from .llama_engine import FinishReason
from .sampling import Sampling
from .text_stream import TextCoder

_MOST_PROMPTS = 64
_MOST_STOPS = 4
_LONGEST_STOP = 256
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (0,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
"""Fields of the protocol that this server knows but cannot obey: the values that change nothing. None is one of them everywhere."""
_KNOWN = ("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "user")


@dataclass(frozen=True, kw_only=True)
class CompletionCall:
    """A completion request that was checked."""

    prompts: tuple[tuple[int, ...], ...]
    """Tokens of each prompt."""
    new_tokens: int
    """Largest number of new tokens of each."""
    samplings: tuple[Sampling, ...]
    """How the tokens of each are chosen."""
    stop: tuple[str, ...]
    """Texts that end a completion."""
    stream: bool
    """Whether parts are sent as they come."""
    usage: bool
    """Whether a stream ends with the counts of tokens."""


def read_call(body: bytes, *, model: str, coder: TextCoder) -> CompletionCall:
    """Read the body of a completion request.

    Args:
        body: JSON from outside; the caller limits its size.
        model: Name of the model that is served.
        coder: Its tokenizer.

    Returns:
        The request.

    Raises:
        UnknownModel: It names another model.
        InvalidInput: Something else is wrong; the message names the field.
    """
    data = strict_json(body, "the body of the request")
    if not isinstance(data, dict):
        raise InvalidInput(f"the body of the request must be a JSON object, found {type(data).__name__}")
    for name, value in data.items():
        require(name in _KNOWN or name in _ONLY, f"this server does not know the field {shown(name)!r}; leave it out")
        if name in _ONLY and value is not None and value not in _ONLY[name]:
            raise InvalidInput(f"this server cannot obey {name}={shown(value)}; leave it out")
    asked = data.get("model")
    if asked is not None and asked != model:
        raise UnknownModel(f"there is no model {shown(asked)!r} here; this server has {model!r}")
    prompts = _prompts(data.get("prompt"), coder)
    seed = _number(data, "seed", None, int)
    sampling = Sampling(
        temperature=float(_number(data, "temperature", 1.0, float)),
        top_p=float(_number(data, "top_p", 1.0, float)),
        seed=secrets.randbits(62) if seed is None else int(seed),
    )
    new_tokens = int(_number(data, "max_tokens", 16, int))
    require(1 <= new_tokens <= 2**24, f"max_tokens must be 1 or more, found {new_tokens}")
    options = data.get("stream_options") or {}
    require(
        isinstance(options, dict) and set(options) <= {"include_usage"},
        f"stream_options may hold include_usage only, found {shown(options)}",
    )
    return CompletionCall(
        prompts=prompts,
        new_tokens=new_tokens,
        samplings=tuple(_seeded(sampling, place) for place in range(len(prompts))),
        stop=_stops(data.get("stop")),
        stream=_flag(data, "stream"),
        usage=_flag(options, "include_usage"),
    )


def _seeded(sampling: Sampling, place: int) -> Sampling:
    """Prompts of one request draw from generators of their own."""
    seed = (sampling.seed + place) % 2**63
    return Sampling(temperature=sampling.temperature, top_p=sampling.top_p, seed=seed)


def _prompts(value: object, coder: TextCoder) -> tuple[tuple[int, ...], ...]:
    advice = "prompt must be a text, a list of texts, a list of tokens, or a list of such lists"
    if isinstance(value, str) or (isinstance(value, list) and value and all(_is_token(one) for one in value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise InvalidInput(f"{advice}, found {shown(value)}")
    require(len(value) <= _MOST_PROMPTS, f"a request may have {_MOST_PROMPTS} prompts, found {len(value)}; send several requests")
    found: list[tuple[int, ...]] = []
    for one in value:
        if isinstance(one, str):
            ids = _encoded(one, coder)
        elif isinstance(one, list) and all(_is_token(token) for token in one):
            ids = one
        else:
            raise InvalidInput(f"{advice}, found {shown(one)} in it")
        require(bool(ids), "a prompt has no token; give a text that is not empty")
        found.append(tuple(ids))
    return tuple(found)


def _encoded(text: str, coder: TextCoder) -> list[int]:
    try:
        return coder.encode(text)
    except Exception as error:  # a foreign tokenizer raises anything
        raise InvalidInput(f"the tokenizer cannot read the prompt: {type(error).__name__}: {shown(error)}") from error


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(data: Mapping[str, Any], name: str, default: Any, kind: type) -> Any:
    value = data.get(name)
    if value is None:
        return default
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InvalidInput(f"{name} must be a {'whole number' if kind is int else 'number'}, found {shown(value)}")
    return value


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name)
    require(value is None or isinstance(value, bool), f"{name} must be true or false, found {shown(value)}")
    return bool(value)


def _stops(value: object) -> tuple[str, ...]:
    words = [] if value is None else [value] if isinstance(value, str) else value
    good = isinstance(words, list) and all(isinstance(w, str) and 0 < len(w) <= _LONGEST_STOP for w in words)
    if not isinstance(words, list) or not good or len(words) > _MOST_STOPS:
        raise InvalidInput(
            f"stop must be a text or a list of {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} letters, found {shown(value)}"
        )
    return tuple(words)


# ---- answers


@dataclass(kw_only=True)
class CompletionText:
    """The completion of one prompt until now."""

    text: str = ""
    """Its text."""
    tokens: int = 0
    """Number of its tokens."""
    finish: FinishReason | None = None
    """Why it ended; None if it goes on."""


class CompletionAnswer:
    """Makes the JSON that answers one request."""

    def __init__(self, call: CompletionCall, *, model: str) -> None:
        self.id, self.created, self._call, self._model = f"cmpl-{secrets.token_hex(12)}", int(time.time()), call, model

    def whole(self, texts: Sequence[CompletionText]) -> dict[str, Any]:
        """Answer with the whole completions.

        Args:
            texts: The completion of each prompt.

        Returns:
            JSON values.
        """
        choices = [_choice(place, one.text, one.finish) for place, one in enumerate(texts)]
        return {**self._head(choices), "usage": self.usage(texts)}

    def part(self, place: int, text: str, finish: FinishReason | None) -> dict[str, Any]:
        """Answer with a part of one completion.

        Args:
            place: Number of the prompt.
            text: New text.
            finish: Why it ended; None if it goes on.

        Returns:
            JSON values.
        """
        return self._head([_choice(place, text, finish)])

    def last(self, texts: Sequence[CompletionText]) -> dict[str, Any]:
        """End a stream with the counts of tokens.

        Args:
            texts: The completion of each prompt.

        Returns:
            JSON values.
        """
        return {**self._head([]), "usage": self.usage(texts)}

    def usage(self, texts: Sequence[CompletionText]) -> dict[str, int]:
        """Count tokens.

        Args:
            texts: The completion of each prompt.

        Returns:
            Tokens of prompts and completions.
        """
        prompts, new = sum(map(len, self._call.prompts)), sum(one.tokens for one in texts)
        return {"prompt_tokens": prompts, "completion_tokens": new, "total_tokens": prompts + new}

    def _head(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"id": self.id, "object": "text_completion", "created": self.created, "model": self._model}
        return {**about, "choices": choices}


def _choice(place: int, text: str, finish: FinishReason | None) -> dict[str, Any]:
    return {"index": place, "text": text, "logprobs": None, "finish_reason": finish}

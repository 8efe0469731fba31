"""One served language model as a running whole: files, memory, queue and engine with its thread, behind methods for any thread.

Read next: `engine_server.py`, what all servers share; `completions.py`, which puts this one behind HTTP.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from ....core.errors import require
from ..runtime.requests import Finished, Request
from .engine_server import EngineServer, RuntimeConfig
from .expert_store import MappedExpertStore
from .llama_engine import Completion, LlamaComputation, LlamaLimits
from .served_models import ServedDescription, ServedModel
from .text_stream import TextCoder


@dataclass(frozen=True, kw_only=True)
class ServingConfig(RuntimeConfig):
    """How a language model is served."""

    whole: bool = False
    """Whether experts are loaded as a whole. Layer by layer works with any budget of one piece, and waits more often."""
    memory: LlamaLimits = LlamaLimits()
    """Length of requests, and bytes of their keys and values."""
    keep_cached: bool = True
    """Whether the system may keep pages of experts that were read. False measures as if its memory was full."""


class CompletionServer(EngineServer):
    """Serves a carved language model until it is closed.

    Example:
        server = CompletionServer(open_served("model"), coder, ServingConfig(budget=200_000_000))
        server.send(Completion(prompt=tuple(coder.encode("Once")), told=print), new_tokens=20, ended=print)
        server.close()
    """

    def __init__(self, served: ServedModel, coder: TextCoder, config: ServingConfig) -> None:
        """Start the threads of engine and transfers.

        Args:
            served: The model. The server closes its file.
            coder: The tokenizer.
            config: How it is served.

        Raises:
            InvalidInput: A piece of an expert is larger than the budget, or the parts do not belong together.
        """
        self.coder, self.config, self.longest = coder, config, min(config.memory.longest, served.backbone.shape.longest)
        self.description: ServedDescription = served.description
        self._numbers = itertools.count()
        store = MappedExpertStore(served.experts, whole=config.whole, keep_cached=config.keep_cached)
        self._computation = LlamaComputation(served.backbone, store, served.pre_gate, coder, config.memory)
        super().__init__(config, store=store, computation=self._computation, gate=self._computation.gate)

    def send(self, completion: Completion, *, new_tokens: int, ended: Callable[[Finished], None]) -> str:
        """Send a request.

        Args:
            completion: What is completed, and who is told about every step.
            new_tokens: Largest number of new tokens.
            ended: Is called once at its end, from the engine's thread. It must not wait.

        Returns:
            Name of the request.

        Raises:
            InvalidInput: It could never be served; the message says why.
            QueueFull: It cannot be served now; the message says the bound.
            QueueClosed: The server is shutting down.
        """
        id = f"cmpl-{next(self._numbers)}"
        self.check_running()
        require(bool(completion.prompt), "the prompt has no token; give a text that is not empty")
        request = Request(id=id, kind="sequence", tokens=len(completion.prompt), new_tokens=new_tokens, payload=completion)
        self._computation.open(request)
        try:
            self.submit(request, ended)
        except Exception:
            self._computation.release(request)
            raise
        return id

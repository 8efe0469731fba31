"""The computation that a runtime serves a carved Llama with: gate, prefill and decode of several requests in one batch.

`LlamaComputation` is the runtime's `Gate` (its method `gate`) and its `Computation`. A request is opened before it is sent: then its
memory is reserved, or it is refused. Every decision of the pre-gate is kept until the request ends, so a near tie cannot flip when a
decision is asked for again.

Experts that are loaded layer by layer are used layer by layer over all tokens of the batch. Experts that are loaded as a whole are used
in waves of requests, each of which passes the whole network. Read next: `completion_server.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

from ....core.errors import InvalidInput, require, require_counts
from ..carving.pre_gate import PreGate
from ..runtime.engine import Outcome, Ungated
from ..runtime.held_experts import HeldExperts
from ..runtime.requests import Request, Work
from ..runtime.scheduling import WorkBatch
from .expert_store import MappedExpertStore
from .key_values import CacheSpan, KeyValueBudget, KeyValueCache
from .llama_backbone import LlamaBackbone
from .llama_decoder import LlamaDecoder, PreGateDecoder
from .sampling import Sampler, Sampling
from .text_stream import TextCoder, TextStream

FinishReason = Literal["stop", "length"]
"""Why a text ended: an end token or a stop string, or the largest number of new tokens."""


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """What one step of a request gave."""

    text: str
    """New text; it may be empty."""
    token: int
    """The new token."""
    finish: FinishReason | None = None
    """Why the text ends here; None if it goes on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """Payload of a request: what is completed, and who is told."""

    prompt: tuple[int, ...]
    """Tokens of the prompt."""
    sampling: Sampling = Sampling()
    """How tokens are chosen."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion; they are not part of it."""
    told: Callable[[TextPart], None]
    """Is called after every step, from the engine's thread."""


@dataclass(frozen=True, kw_only=True)
class LlamaLimits:
    """Memory of open requests."""

    cache_bytes: int = 1 << 30
    """Largest number of bytes of keys and values of all open requests, those of the pre-gate included."""
    longest: int = 2048
    """Largest number of tokens of a request, prompt and new ones together; the model's own limit holds, too."""

    def __post_init__(self) -> None:
        require_counts("LlamaLimits", most=2**60, cache_bytes=self.cache_bytes)
        require_counts("LlamaLimits", least=2, most=2**24, longest=self.longest)


@dataclass(kw_only=True, eq=False)
class _Sequence:
    """What is kept of an open request. Only the engine's thread uses it after it was sent."""

    completion: Completion
    room: int
    stream: TextStream
    sampler: Sampler
    ids: list[int]
    decisions: list[int] = field(default_factory=list)
    cache: KeyValueCache | None = None
    gate_cache: KeyValueCache | None = None


class LlamaComputation:
    """Serves a carved Llama.

    Example:
        computation = LlamaComputation(backbone, store, pre_gate, coder)
        engine = Engine(config, gate=computation.gate, computation=computation, ...)
        computation.open(request)
        queue.submit(request)
    """

    def __init__(
        self,
        backbone: LlamaBackbone,
        store: MappedExpertStore,
        pre_gate: PreGate | None,
        coder: TextCoder,
        limits: LlamaLimits = LlamaLimits(),
    ) -> None:
        """Join the parts.

        Args:
            backbone: What is always in memory.
            store: Its experts.
            pre_gate: Chooses the expert of each token; None where there is one expert only.
            coder: The tokenizer.
            limits: Memory of open requests.

        Raises:
            InvalidInput: The parts do not belong together.
        """
        form, shape = store.form, backbone.shape
        wide = {(piece.width_in, piece.width_out) for piece in form.forms}
        experts = 1 if pre_gate is None else pre_gate.config.experts
        require(
            form.layers == shape.layers and wide == {(shape.width, shape.width)} and form.dtype == backbone.embed.dtype,
            f"the experts have {form.layers} layers of widths {sorted(wide)} in {form.numbers}, and the backbone has {shape.layers} of "
            f"{shape.width} in {backbone.embed.dtype}; give files of one model",
        )
        require(experts == form.experts, f"the pre-gate chooses among {experts} experts, and the file has {form.experts}")
        if pre_gate is not None and pre_gate.config.vocabulary < shape.vocabulary:
            raise InvalidInput(f"the pre-gate knows {pre_gate.config.vocabulary} tokens, and the model {shape.vocabulary}")
        self.limits, self.longest = limits, min(limits.longest, shape.longest)
        self.budget = KeyValueBudget(limits.cache_bytes)
        self._decoder, self._store, self._coder = LlamaDecoder(backbone), store, coder
        self._gate = None if pre_gate is None else PreGateDecoder(pre_gate)
        self._device = backbone.embed.device
        self._lock = Lock()
        self._open: dict[str, _Sequence] = {}

    # ---- requests come and go

    def open(self, request: Request) -> None:
        """Reserve the memory of a request, before it is sent to the queue. Any thread may call this.

        Args:
            request: The request, whose payload is a `Completion`.

        Raises:
            InvalidInput: It is longer than the model or the limits allow, or has a token that the model does not know.
            QueueFull: Its memory is not free now.
        """
        completion = request.payload
        if not isinstance(completion, Completion):
            raise InvalidInput(f"request {request.id!r} needs a Completion as its payload, found {type(completion).__name__}")
        prompt, known = completion.prompt, self._decoder.backbone.shape.vocabulary
        require(
            len(prompt) == request.tokens and request.kind == "sequence",
            f"request {request.id!r} must be a sequence of its {len(prompt)} tokens, found a {request.kind} of {request.tokens}",
        )
        require(
            all(0 <= token < known for token in prompt),
            f"tokens must be in 0..{known - 1}, found {[token for token in prompt if not 0 <= token < known][:3]}",
        )
        room = request.tokens + request.new_tokens - 1  # the last new token is not fed back
        require(
            request.tokens + request.new_tokens <= self.longest,
            f"a prompt of {request.tokens} tokens and {request.new_tokens} new ones are longer than the {self.longest} tokens that are "
            "served; shorten the prompt or max_tokens",
        )
        made = _Sequence(
            completion=completion,
            room=room,
            stream=TextStream(self._coder, stop=completion.stop),
            sampler=Sampler(completion.sampling),
            ids=list(prompt),
        )
        self.budget.reserve(request.id, self._bytes(room))
        with self._lock:
            self._open[request.id] = made

    def release(self, request: Request) -> None:
        """Forget a request and give its memory back; nothing happens if it is not open.

        Args:
            request: The request.
        """
        with self._lock:
            self._open.pop(request.id, None)
        self.budget.release(request.id)

    def _bytes(self, room: int) -> int:
        gate = 0 if self._gate is None else self._gate.key_values.bytes_of(room)
        return self._decoder.key_values.bytes_of(room) + gate

    def _of(self, request: Request) -> _Sequence:
        with self._lock:
            found = self._open.get(request.id)
        if found is None:
            raise InvalidInput(f"request {request.id!r} was not opened before it was sent")
        return found

    # ---- decisions

    def gate(self, asked: Sequence[Ungated]) -> list[tuple[int, ...]]:
        """Decide which expert serves each new token. What was decided is kept.

        Args:
            asked: Works whose experts are wanted.

        Returns:
            The expert of each token of each work.
        """
        sequences = [self._of(one.request) for one in asked]
        ends = [one.request.tokens + one.generated for one in asked]
        missing = [(seq, end) for seq, end in zip(sequences, ends) if len(seq.decisions) < end]
        if self._gate is None:
            for seq, end in missing:
                seq.decisions += [0] * (end - len(seq.decisions))
        elif missing:
            self._decide(self._gate, missing)
        firsts = [0 if not one.generated else end - 1 for one, end in zip(asked, ends)]
        return [tuple(seq.decisions[first:end]) for seq, first, end in zip(sequences, firsts, ends)]

    def _decide(self, gate: PreGateDecoder, missing: Sequence[tuple[_Sequence, int]]) -> None:
        ids: list[int] = []
        spans: list[CacheSpan] = []
        for seq, end in missing:
            if seq.gate_cache is None:
                seq.gate_cache = gate.new_cache(seq.room)
            new = seq.ids[len(seq.decisions) : end]
            spans.append(CacheSpan(cache=seq.gate_cache, first=len(ids), count=len(new)))
            ids += new
        chosen = gate.decide(torch.tensor(ids, device=self._device), spans)
        for (seq, _), span in zip(missing, spans):
            seq.decisions += chosen[span.first : span.first + span.count]

    # ---- computing

    def run(self, batch: WorkBatch, experts: HeldExperts) -> list[Outcome]:
        """Compute one step of every work: all tokens of a prompt, or the last new token.

        Args:
            batch: The works.
            experts: Gives their experts, wave by wave.

        Returns:
            One outcome for each work.
        """
        logits: dict[Work, Tensor] = {}
        if experts.layout.layers == 1:
            routed = 0.0
            for wave in experts.waves():
                step = _Step(self, wave.works)
                logits |= step.run(lambda layer, x, y, step=step: step.add(layer, step.experts, x, y))  # type: ignore[misc]
                routed += step.routed
            experts.routed_seconds = routed
        else:
            step = _Step(self, batch.works)

            def add_own(layer: int, x: Tensor, y: Tensor) -> None:
                for wave in experts.waves(layer):
                    step.add(layer, wave.experts, x, y)

            logits |= step.run(add_own)
        return [self._finish(work, logits.get(work), experts.failed.get(work)) for work in batch.works]

    def _finish(self, work: Work, logits: Tensor | None, error: Exception | None) -> Outcome:
        """Choose the next token of a work, tell its text, and say whether it ended."""
        if error is not None or logits is None:
            return Outcome(error=error)
        seq = self._of(work.request)
        try:
            token = seq.sampler.choose(logits)
            seq.ids.append(token)
            ended = token in self._decoder.backbone.shape.end_tokens
            text = "" if ended else seq.stream.add(token)
            finish: FinishReason | None = "stop" if ended or seq.stream.stopped else None
            if finish is None and len(seq.ids) - work.request.tokens >= work.request.new_tokens:
                finish = "length"
            if finish is not None:
                text += seq.stream.rest()
            seq.completion.told(TextPart(text=text, token=token, finish=finish))
        except Exception as fault:  # of one request: the others of the batch go on
            return Outcome(error=fault)
        return Outcome(finished=finish == "stop")


class _Step:
    """One pass of some works through the network."""

    def __init__(self, owner: LlamaComputation, works: Sequence[Work]) -> None:
        self._decoder, self._store, device = owner._decoder, owner._store, owner._device
        self.works, self.routed = works, 0.0
        ids: list[int] = []
        chosen: list[int] = []
        self._spans: list[CacheSpan] = []
        for work in works:
            seq = owner._of(work.request)
            if seq.cache is None:
                seq.cache = self._decoder.new_cache(seq.room)
            new = seq.ids[seq.cache.used :]
            if len(new) != work.tokens or len(work.experts) != work.tokens:
                raise InvalidInput(
                    f"a work of {work.tokens} tokens and {len(work.experts)} experts came for {work.request.id!r}, which has "
                    f"{len(new)} new tokens; one expert serves a token"
                )
            self._spans.append(CacheSpan(cache=seq.cache, first=len(ids), count=len(new)))
            ids += new
            chosen += work.experts
        self._ids = torch.tensor(ids, device=device)
        self.experts = tuple(sorted(set(chosen)))
        every = torch.tensor(chosen, device=device)
        alone = len(self.experts) == 1
        self._rows = {e: None if alone else (every == e).nonzero()[:, 0] for e in self.experts}

    def run(self, add_own: Callable[[int, Tensor, Tensor], None]) -> dict[Work, Tensor]:
        """Pass through the network and give the logits of each work's last token."""
        hidden = self._decoder.forward(self._ids, self._spans, add_own)
        last = torch.tensor([span.first + span.count - 1 for span in self._spans], device=hidden.device)
        return dict(zip(self.works, self._decoder.logits(hidden[last])))

    def add(self, layer: int, experts: Sequence[int], x: Tensor, y: Tensor) -> None:
        """Add what some experts of a layer compute for their tokens."""
        begin = time.perf_counter()
        for expert in experts:
            part, rows = self._store.part(expert=expert, layer=layer), self._rows[expert]
            if rows is None:
                y += part.apply(x)
            else:
                y.index_add_(0, rows, part.apply(x[rows]))
        self.routed += time.perf_counter() - begin

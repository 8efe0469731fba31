"""A served language model behind HTTP: `/v1/completions` and `/v1/models` as OpenAI's, `/health` and `/metrics`.

Starlette is imported inside the functions: the extra `serve` installs it. There is no global state; an application belongs to one
`CompletionServer`.

| what happens | answer |
|---|---|
| the queue, or the memory of keys and values, is full | 429 with `Retry-After`, and the bound in the message |
| the server shuts down | 503 with `Retry-After` |
| a field is wrong, unknown or cannot be obeyed | 400 that names it |
| the client goes away | its requests are cancelled before their next step |

Read next: `completion_calls.py`, the JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from ....core.errors import InvalidInput, UpcycleError
from ..runtime.metrics import prometheus_text
from ..runtime.requests import Finished, QueueClosed
from .completion_calls import CompletionAnswer, CompletionCall, CompletionText, error_json, read_call, status_of
from .completion_server import CompletionServer
from .llama_engine import Completion, TextPart

log = logging.getLogger(__name__)

MOST_BODY_BYTES = 4 << 20
"""Bytes of the largest request body that is read."""
_GONE = 499
"""Status in the log of a request whose client went away; nobody reads it."""


class BodyTooLarge(InvalidInput):
    """The body of a request has more bytes than are read."""


def completions_app(server: CompletionServer, *, grace: float = 0.0, retry_after: int = 1) -> Any:
    """Make an ASGI application of a server.

    Args:
        server: What serves. The application closes it when it is shut down.
        grace: Seconds in which open requests may still be served at a shutdown.
        retry_after: Seconds after which a refused client may come back.

    Returns:
        A `starlette.applications.Starlette`.

    Raises:
        InvalidInput: The package starlette is not installed.

    Example:
        uvicorn.run(completions_app(server), host="127.0.0.1", port=8000)
    """
    try:
        from starlette.applications import Starlette
        from starlette.routing import Route
    except ImportError as error:
        raise InvalidInput(
            "the endpoints need the package starlette, which is not installed; pip install -c constraints.txt -e '.[serve]'"
        ) from error
    ends = CompletionEndpoints(server, retry_after=retry_after)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, partial(server.close, grace=grace))

    routes = [
        Route("/v1/completions", ends.complete, methods=["POST"]),
        Route("/v1/models", ends.models, methods=["GET"]),
        Route("/health", ends.health, methods=["GET"]),
        Route("/metrics", ends.metrics, methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


class CompletionEndpoints:
    """The endpoints of one server, as Starlette calls them."""

    def __init__(self, server: CompletionServer, *, retry_after: int = 1) -> None:
        self._server, self._retry_after = server, retry_after
        self._created = int(time.time())

    async def models(self, request: Any) -> Any:
        """List the one model.

        Args:
            request: Starlette's request.

        Returns:
            Starlette's response.
        """
        from starlette.responses import JSONResponse

        told = {"id": self._server.description.name, "object": "model", "created": self._created, "owned_by": "upcycle3d"}
        return JSONResponse({"object": "list", "data": [told]})

    async def health(self, request: Any) -> Any:
        """Say whether requests are taken.

        Args:
            request: Starlette's request.

        Returns:
            Starlette's response: 200 or 503.
        """
        from starlette.responses import JSONResponse

        good = self._server.healthy
        return JSONResponse({"status": "ok" if good else "not serving"}, status_code=200 if good else 503)

    async def metrics(self, request: Any) -> Any:
        """Give the report of the runtime to Prometheus.

        Args:
            request: Starlette's request.

        Returns:
            Starlette's response.
        """
        from starlette.responses import PlainTextResponse

        try:
            text = prometheus_text(self._server.report())
        except InvalidInput as error:  # prometheus_client is not installed
            return PlainTextResponse(str(error), status_code=501)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def complete(self, request: Any) -> Any:
        """Complete prompts, as a whole or as a stream of server-sent events.

        Args:
            request: Starlette's request.

        Returns:
            Starlette's response.
        """
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse, Response

        try:
            body = await _body(request)
            call = read_call(body, model=self._server.description.name, coder=self._server.coder)
            running = _RunningCall(self._server, call)
        except BodyTooLarge as error:
            return JSONResponse(error_json(error, 413), status_code=413)
        except UpcycleError as error:
            return self._refusal(error)
        except ClientDisconnect:
            return Response(status_code=_GONE)
        if call.stream:
            return _streamed(running)
        try:
            answer = await _unless_gone(request.receive, running.whole())
        except Exception as error:
            return self._refusal(error)
        finally:
            running.cancel()
        return Response(status_code=_GONE) if answer is None else JSONResponse(answer)

    def _refusal(self, error: Exception) -> Any:
        from starlette.responses import JSONResponse

        status = status_of(error)
        if not isinstance(error, UpcycleError):
            log.error("a completion failed", exc_info=error)
        headers = {"Retry-After": str(self._retry_after)} if status in (429, 503) else None
        return JSONResponse(error_json(error, status), status_code=status, headers=headers)


class _RunningCall:
    """The prompts of one call while they are served. All are taken, or none."""

    def __init__(self, server: CompletionServer, call: CompletionCall) -> None:
        self._server, self._call = server, call
        self._answer = CompletionAnswer(call, model=server.description.name)
        self._texts = [CompletionText() for _ in call.prompts]
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, TextPart | Finished]] = asyncio.Queue()
        self._open: dict[int, str] = {}
        try:
            for place, (prompt, sampling) in enumerate(zip(call.prompts, call.samplings)):
                completion = Completion(prompt=prompt, sampling=sampling, stop=call.stop, told=partial(self._tell, place))
                self._open[place] = server.send(completion, new_tokens=call.new_tokens, ended=partial(self._tell, place))
        except Exception:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End what is still open."""
        for id in self._open.values():
            self._server.cancel(id)

    async def whole(self) -> dict[str, Any]:
        """Wait for all prompts."""
        async for _ in self._parts():
            pass
        return self._answer.whole(self._texts)

    async def events(self) -> AsyncIterator[str]:
        """Give server-sent events."""
        try:
            async for place, part in self._parts():
                if part.text or part.finish is not None:
                    yield _event(self._answer.part(place, part.text, part.finish))
            if self._call.usage:
                yield _event(self._answer.last(self._texts))
        except UpcycleError as error:
            yield _event(error_json(error, status_of(error)))
        except Exception as error:
            log.exception("a completion failed")
            yield _event(error_json(error, 500))
        yield "data: [DONE]\n\n"

    async def _parts(self) -> AsyncIterator[tuple[int, TextPart]]:
        while self._open:
            place, news = await self._news.get()
            if isinstance(news, Finished):
                self._open.pop(place, None)
                self._check(news)
                continue
            text = self._texts[place]
            text.text += news.text
            text.tokens += 1
            text.finish = news.finish
            yield place, news

    def _check(self, end: Finished) -> None:
        """Raise what a request ended with, unless it was served."""
        if end.status == "failed" and end.error is not None:
            raise UpcycleError(str(end.error)) if isinstance(end.error, InvalidInput) else end.error
        if end.status in ("refused", "cancelled"):
            raise QueueClosed("the request was open when the server shut down; send it to another one")

    def _tell(self, place: int, news: TextPart | Finished) -> None:
        """Called from the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._news.put_nowait, (place, news))


def _streamed(running: _RunningCall) -> Any:
    """A response whose requests are cancelled however it ends, also when the client leaves while nothing is sent."""
    from starlette.responses import StreamingResponse

    class Streamed(StreamingResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                with suppress(OSError):  # the client left while a part was sent
                    await _unless_gone(receive, self.stream_response(send))
            finally:
                running.cancel()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return Streamed(running.events(), media_type="text/event-stream", headers=headers)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


async def _body(request: Any) -> bytes:
    """Read a body of limited size."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BODY_BYTES:
            raise BodyTooLarge(f"the body of the request has more than {MOST_BODY_BYTES:,} bytes; send fewer prompts at once")
        parts.append(part)
    return b"".join(parts)


async def _unless_gone(receive: Any, work: Any) -> Any:
    """Wait for a coroutine, or for the client to leave; None then."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)

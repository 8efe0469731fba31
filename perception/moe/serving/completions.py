"""A served language model behind HTTP: `/v1/completions` and `/v1/models` as OpenAI's, `/health` and `/metrics`.

A field that is wrong, unknown or cannot be obeyed is a 400 that names it, and 429 also says that the memory of keys and values is full.
Read next: `completion_calls.py`, the JSON; `endpoints.py`, what all servers share.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Any

from ....core.errors import UpcycleError
from ..runtime.requests import Finished
from .completion_calls import CompletionAnswer, CompletionCall, CompletionText, read_call
from .completion_server import CompletionServer
from .endpoints import GONE, ServerEndpoints, check_served, read_body, server_app, unless_gone
from .http_errors import error_json, status_of
from .llama_engine import Completion, TextPart

log = logging.getLogger(__name__)

MOST_BODY_BYTES = 4 << 20
"""Bytes of the largest request body that is read."""


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
    ends = CompletionEndpoints(server, retry_after=retry_after)
    routes = {"/v1/completions": ("POST", ends.complete), "/v1/models": ("GET", ends.models)}
    return server_app(ends, server, routes, grace=grace)


class CompletionEndpoints(ServerEndpoints):
    """The endpoints of one language model, as Starlette calls them."""

    def __init__(self, server: CompletionServer, *, retry_after: int = 1) -> None:
        super().__init__(server, retry_after=retry_after)
        self._server = server
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
            body = await read_body(request, most=MOST_BODY_BYTES, advice="send fewer prompts at once")
            call = read_call(body, model=self._server.description.name, coder=self._server.coder)
            running = _RunningCall(self._server, call)
        except UpcycleError as error:
            return self.refusal(error)
        except ClientDisconnect:
            return Response(status_code=GONE)
        if call.stream:
            return _streamed(running)
        try:
            answer = await unless_gone(request.receive, running.whole())
        except Exception as error:
            return self.refusal(error)
        finally:
            running.cancel()
        return Response(status_code=GONE) if answer is None else JSONResponse(answer)


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
                check_served(news)
                continue
            text = self._texts[place]
            text.text += news.text
            text.tokens += 1
            text.finish = news.finish
            yield place, news

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
                    await unless_gone(receive, self.stream_response(send))
            finally:
                running.cancel()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return Streamed(running.events(), media_type="text/event-stream", headers=headers)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"

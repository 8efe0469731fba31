"""What the HTTP of every server of a carved model has in common: `/health`, `/metrics`, bodies of limited size, refusals, shutdown.

Starlette is imported inside the functions: the extra `serve` installs it. There is no global state, and there is no authentication: put a
proxy before it that has one.

| what happens | answer |
|---|---|
| the queue is full | 429 with `Retry-After`, and the bound in the message |
| the server shuts down | 503 with `Retry-After` |
| a request is wrong or cannot be obeyed | 400 that says what |
| a body is too large | 413, and no more of it is read |
| the client goes away | its requests are cancelled before their next step |

Read next: `completions.py`, and `perception/moe/driving/detections.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from ....core.errors import InvalidInput, UpcycleError
from ..runtime.metrics import prometheus_text
from ..runtime.requests import Finished, QueueClosed
from .engine_server import EngineServer
from .http_errors import BodyTooLarge, error_json, status_of

log = logging.getLogger(__name__)

GONE = 499
"""Status in the log of a request whose client went away; nobody reads it."""

Endpoint = Callable[[Any], Awaitable[Any]]
"""Answers one request of Starlette."""


class ServerEndpoints:
    """The endpoints that every server has, as Starlette calls them."""

    def __init__(self, server: EngineServer, *, retry_after: int = 1) -> None:
        """Keep the server.

        Args:
            server: What serves.
            retry_after: Seconds after which a refused client may come back.
        """
        self._engine_server, self._retry_after = server, retry_after

    async def health(self, request: Any) -> Any:
        """Say whether requests are taken.

        Args:
            request: Starlette's request.

        Returns:
            Starlette's response: 200 or 503.
        """
        from starlette.responses import JSONResponse

        good = self._engine_server.healthy
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
            text = prometheus_text(self._engine_server.report())
        except InvalidInput as error:  # prometheus_client is not installed
            return PlainTextResponse(str(error), status_code=501)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    def refusal(self, error: Exception) -> Any:
        """Answer an error.

        Args:
            error: What went wrong. One that nobody foresaw is logged.

        Returns:
            Starlette's response.
        """
        from starlette.responses import JSONResponse

        status = status_of(error)
        if not isinstance(error, UpcycleError):
            log.error("a request failed", exc_info=error)
        headers = {"Retry-After": str(self._retry_after)} if status in (429, 503) else None
        return JSONResponse(error_json(error, status), status_code=status, headers=headers)


def server_app(ends: ServerEndpoints, server: EngineServer, routes: Mapping[str, tuple[str, Endpoint]], *, grace: float) -> Any:
    """Make an ASGI application of a server.

    Args:
        ends: Its endpoints.
        server: What serves. The application closes it when it is shut down.
        routes: Method and function of each path besides `/health` and `/metrics`.
        grace: Seconds in which open requests may still be served at a shutdown.

    Returns:
        A `starlette.applications.Starlette`.

    Raises:
        InvalidInput: The package starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.routing import Route
    except ImportError as error:
        raise InvalidInput(
            "the endpoints need the package starlette, which is not installed; pip install -c constraints.txt -e '.[serve]'"
        ) from error

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, partial(server.close, grace=grace))

    every = {**routes, "/health": ("GET", ends.health), "/metrics": ("GET", ends.metrics)}
    return Starlette(
        routes=[Route(path, function, methods=[method]) for path, (method, function) in every.items()], lifespan=lifespan
    )


async def read_body(request: Any, *, most: int, advice: str) -> bytes:
    """Read a body of limited size. One that says that it is larger is refused before any of it is read.

    Args:
        request: Starlette's request.
        most: Bytes that are read at most.
        advice: What the client can do, for the message.

    Returns:
        The body.

    Raises:
        BodyTooLarge: It is larger.
    """
    told = request.headers.get("content-length", "")
    size = int(told) if told.isascii() and told.isdigit() and len(told) < 20 else 0
    parts: list[bytes] = []
    if size <= most:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                break
            parts.append(part)
    if size > most:
        raise BodyTooLarge(f"the body of the request has more than {most:,} bytes; {advice}")
    return b"".join(parts)


async def unless_gone(receive: Any, work: Any) -> Any:
    """Wait for a coroutine, or for the client to leave.

    Args:
        receive: Starlette's function that gives the client's messages.
        work: The coroutine.

    Returns:
        Its result; None if the client left.
    """

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


def check_served(end: Finished) -> None:
    """Raise what a request ended with, unless it was served.

    Args:
        end: Its end.

    Raises:
        UpcycleError: The request failed in a way that the message explains.
        QueueClosed: The server shut down before.
        Exception: An error that nobody foresaw.
    """
    if end.status == "failed" and end.error is not None:
        raise UpcycleError(str(end.error)) if isinstance(end.error, InvalidInput) else end.error
    if end.status in ("refused", "cancelled"):
        raise QueueClosed("the request was open when the server shut down; send it to another one")

"""A carved detector behind HTTP: `POST /v1/detections` with one scan, `/health` and `/metrics`. There is no authentication.

The body is the scan alone: float32 numbers, little-endian, point after point, in the frame of the sensor and with the columns that the
detector reads. `GET /v1/models` says which ones these are. Boxes come back in the same frame. Read next: `serving/endpoints.py`, which
says how errors are answered.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import numpy as np

from ....core.errors import InvalidInput, UpcycleError, require
from ....core.foreign_text import shown
from ....core.structures import PointCloud, scan_of_table
from ..runtime.requests import Finished
from ..serving.endpoints import GONE, ServerEndpoints, check_served, read_body, server_app, unless_gone
from .detection_server import DetectionServer, FoundObjects

MOST_POINTS = 400_000
"""Points of the largest scan that is read: twice those of the densest sensor that we know."""


def detections_app(server: DetectionServer, *, grace: float = 0.0, retry_after: int = 1, most_points: int = MOST_POINTS) -> Any:
    """Make an ASGI application of a server.

    Args:
        server: What serves. The application closes it when it is shut down.
        grace: Seconds in which open requests may still be served at a shutdown.
        retry_after: Seconds after which a refused client may come back.
        most_points: Points of the largest scan that is read.

    Returns:
        A `starlette.applications.Starlette`.

    Raises:
        InvalidInput: The package starlette is not installed.

    Example:
        uvicorn.run(detections_app(server), host="127.0.0.1", port=8000)
    """
    ends = DetectionEndpoints(server, retry_after=retry_after, most_points=most_points)
    return server_app(ends, server, {"/v1/detections": ("POST", ends.detect), "/v1/models": ("GET", ends.models)}, grace=grace)


def scan_of_body(body: bytes, columns: tuple[str, ...]) -> PointCloud:
    """Read a scan out of the body of a request.

    Args:
        body: float32 numbers, little-endian, point after point.
        columns: What the numbers of a point are.

    Returns:
        The scan.

    Raises:
        InvalidInput: There is no point, a point is incomplete, or a number is NaN or infinite.
    """
    row, said = 4 * len(columns), f"float32 little-endian, {len(columns)} numbers per point: {', '.join(columns)}"
    require(bool(body), f"the body is empty; it must hold one scan ({said})")
    require(len(body) % row == 0, f"the body has {len(body):,} bytes, which is no whole number of points of {row} bytes ({said})")
    rows = np.frombuffer(body, dtype="<f4").reshape(-1, len(columns)).astype(np.float32)
    return scan_of_table(rows, columns, drop_non_finite=False)


class DetectionEndpoints(ServerEndpoints):
    """The endpoints of one carved detector, as Starlette calls them."""

    def __init__(self, server: DetectionServer, *, retry_after: int = 1, most_points: int = MOST_POINTS) -> None:
        super().__init__(server, retry_after=retry_after)
        self._server, self._most_points = server, most_points

    async def models(self, request: Any) -> Any:
        """Say what is served and what a scan must look like.

        Args:
            request: Starlette's request.

        Returns:
            Starlette's response.
        """
        from starlette.responses import JSONResponse

        opened = self._server.opened
        told = {
            "id": opened.digest,
            "object": "model",
            "owned_by": "upcycle3d",
            "contexts": list(opened.description.contexts),
            "classes": list(opened.detector.class_names),
            "columns": list(opened.columns),
            "most_points": self._most_points,
        }
        return JSONResponse({"object": "list", "data": [told]})

    async def detect(self, request: Any) -> Any:
        """Find the objects of one scan.

        Args:
            request: Starlette's request.

        Returns:
            Starlette's response.
        """
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse, Response

        columns = self._server.opened.columns
        try:
            kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
            require(
                kind in ("application/octet-stream", "application/x-www-form-urlencoded"),  # curl names the second one by itself
                f"the body must be the numbers themselves (application/octet-stream), found {shown(kind)}",
            )
            most = 4 * len(columns) * self._most_points
            body = await read_body(request, most=most, advice=f"send one scan of at most {self._most_points:,} points")
            running = _RunningScan(self._server, scan_of_body(body, columns))
        except UpcycleError as error:
            return self.refusal(error)
        except ClientDisconnect:
            return Response(status_code=GONE)
        try:
            found = await unless_gone(request.receive, running.whole())
        except Exception as error:
            return self.refusal(error)
        finally:
            running.cancel()
        return Response(status_code=GONE) if found is None else JSONResponse(self._answer(running.id, found, running.points))

    def _answer(self, id: str, found: FoundObjects, points: int) -> dict[str, Any]:
        opened, objects = self._server.opened, found.objects
        return {
            "id": id,
            "object": "detections",
            "model": opened.digest,
            "context": opened.description.contexts[found.context],
            "points": points,
            "boxes": [[round(value, 3) for value in box] for box in objects.boxes.data.tolist()],
            "scores": [round(score, 4) for score in objects.scores.tolist()],
            "labels": [opened.detector.class_names[number] for number in objects.classes.tolist()],
        }


class _RunningScan:
    """One scan while it is served."""

    def __init__(self, server: DetectionServer, scan: PointCloud) -> None:
        self._server, self.points = server, len(scan)
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[FoundObjects | Finished] = asyncio.Queue()
        self._open = True
        self.id = server.send(scan, told=self._tell, ended=self._tell)

    def cancel(self) -> None:
        """End it if it is still open."""
        if self._open:
            self._server.cancel(self.id)

    async def whole(self) -> FoundObjects:
        """Wait for the end."""
        found: FoundObjects | None = None
        while True:
            news = await self._news.get()
            if isinstance(news, Finished):
                self._open = False
                check_served(news)
                if found is None:
                    raise InvalidInput("the scan was served, and nothing was said about it")
                return found
            found = news

    def _tell(self, news: FoundObjects | Finished) -> None:
        """Called from the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)

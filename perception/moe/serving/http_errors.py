"""Which HTTP status and which JSON an error is answered with, the same at every endpoint. Read next: `endpoints.py`."""

from __future__ import annotations

from typing import Any

from ....core.errors import InvalidInput, UpcycleError
from ..runtime.requests import QueueClosed, QueueFull


class UnknownModel(InvalidInput):
    """A request names a model that is not served here."""


class BodyTooLarge(InvalidInput):
    """The body of a request has more bytes than are read."""


def status_of(error: Exception) -> int:
    """Say which HTTP status an error is answered with.

    Args:
        error: What went wrong.

    Returns:
        404 for another model, 413 for a body that is too large, 429 for overload, 503 while shutting down, 400 for other bad input, else 500.
    """
    for kind, status in ((UnknownModel, 404), (BodyTooLarge, 413), (QueueFull, 429), (QueueClosed, 503), (InvalidInput, 400)):
        if isinstance(error, kind):
            return status
    return 500


def error_json(error: Exception, status: int) -> dict[str, Any]:
    """Write an error as OpenAI's protocol wants it.

    Args:
        error: What went wrong.
        status: HTTP status.

    Returns:
        JSON values. Of an error that nobody foresaw they say only that there was one: its text may hold what others asked.
    """
    kinds = {404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    foreseen = isinstance(error, UpcycleError)
    message = str(error) if foreseen else "the server made an error, which its log explains"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}

"""Runs an application until Ctrl-C or SIGTERM: what the serving commands share.

Read next: `moe_serve.py`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..core.errors import InvalidInput, require, require_numbers
from .console import console


def check_service(*, port: int, grace: float) -> None:
    """Refuse options with which nothing could be served, before anything is loaded.

    Args:
        port: Port to listen at.
        grace: Seconds in which open requests may end.

    Raises:
        InvalidInput: A number is out of range.
    """
    require(0 <= port < 65_536, f"--port must be in 0..65535, found {port}")
    require_numbers("--grace", least=0.0, most=86_400.0, grace=grace)


def check_packages() -> None:
    """Refuse an installation with which nothing could be served.

    Raises:
        InvalidInput: A package is missing; the message says how to install it.
    """
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InvalidInput(
            "moe serve needs the packages starlette, uvicorn and prometheus_client; pip install -c constraints.txt -e '.[serve]'"
        ) from error


def run_service(app: Any, path: str, *, host: str, port: int, grace: float) -> None:
    """Answer requests until Ctrl-C or SIGTERM, and return.

    Args:
        app: The ASGI application.
        path: Path that is printed.
        host: Address to listen at.
        port: Port to listen at.
        grace: Seconds in which open requests may end.
    """
    import uvicorn

    console.print(f"listening at http://{host}:{port}{path}; Ctrl-C ends it", soft_wrap=True)
    with _signals_that_do_not_kill():
        uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=max(1, round(grace)))


@contextmanager
def _signals_that_do_not_kill() -> Iterator[None]:
    """uvicorn ends well at Ctrl-C and SIGTERM, and then raises the signal again: that must not end the process before its report."""
    kept = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)

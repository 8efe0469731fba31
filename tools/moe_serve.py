"""`upcycle3d moe serve`: answer completion requests with a carved language model whose experts come from the disk as they are needed.

Read next: `perception/moe/serving/completions.py`, the endpoints.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..core.errors import InvalidInput, require, require_numbers
from ..perception.moe.runtime.scheduling import BatchLimits
from ..perception.moe.serving.completion_server import CompletionServer, ServingConfig
from ..perception.moe.serving.completions import completions_app
from ..perception.moe.serving.hugging_face_coder import HuggingFaceCoder
from ..perception.moe.serving.llama_engine import LlamaLimits
from ..perception.moe.serving.served_models import ServedModel, open_served
from ..perception.moe.serving.text_stream import TextCoder
from .console import console, run_command
from .serving_options import CacheName, PolicyName, cache_of, policy_of, read_bytes


@dataclass(frozen=True, kw_only=True)
class MoeServe:
    """Serve a carved language model behind `/v1/completions`, `/v1/models`, `/health` and `/metrics` until Ctrl-C or SIGTERM."""

    folder: tyro.conf.Positional[Path]
    """Folder with `backbone.safetensors`, `experts.safetensors` and a tokenizer, as `upcycle3d moe readme` writes it."""
    budget: str
    """Experts that memory holds, such as 200MB. What is always in memory comes on top, and the command prints it."""
    policy: PolicyName = "expert_aware"
    """What fills batches."""
    cache: CacheName = "belady"
    """What decides which experts go."""
    whole: bool = False
    """Load experts as a whole instead of layer by layer. All experts of a prompt must then fit into the budget together."""
    fetch_ahead: bool = True
    """Fetch experts before a batch waits for them."""
    foreseen: int = 1
    """Batches that are foreseen."""
    tokens: int = 2048
    """Tokens that a batch holds; a longer prompt is refused."""
    longest: int = 2048
    """Longest request, prompt and new tokens together."""
    keys_values: str = "1GB"
    """Memory for keys and values of all open requests; a request that does not fit is refused."""
    most_requests: int = 64
    """Open requests; more are refused."""
    host: str = "127.0.0.1"
    """Address to listen at. There is no authentication: put a proxy before it that has one, or keep this address."""
    port: int = 8000
    """Port to listen at."""
    grace: float = 30.0
    """Seconds in which open requests may end after Ctrl-C or SIGTERM."""
    keep_cached: bool = True
    """Let the system keep pages of experts that were read. Turn it off to measure as if its memory was full."""


def serving_config(config: MoeServe) -> ServingConfig:
    """Read how the model is served.

    Args:
        config: The options.

    Returns:
        The configuration of the server.

    Raises:
        InvalidInput: A number is out of range.
    """
    return ServingConfig(
        budget=read_bytes(config.budget, "--budget"),
        whole=config.whole,
        policy=policy_of(config.policy),
        eviction=cache_of(config.cache),
        fetch_ahead=config.fetch_ahead,
        foreseen=config.foreseen,
        batch=BatchLimits(tokens=config.tokens),
        memory=LlamaLimits(cache_bytes=read_bytes(config.keys_values, "--keys-values"), longest=config.longest),
        most_requests=config.most_requests,
        keep_cached=config.keep_cached,
    )


def describe(served: ServedModel, config: ServingConfig) -> str:
    """Say what will be in memory.

    Args:
        served: The model.
        config: How it is served.

    Returns:
        Some lines.
    """
    sizes = served.experts.form.expert_bytes
    experts = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in zip(served.description.domains, sizes))
    return "\n".join(
        [
            str(served.description),
            f"always in memory: {served.resident_bytes / 1e6:.1f} MB",
            f"experts on the disk: {experts}; together {sum(sizes) / 1e6:.1f} MB, of which {config.budget / 1e6:.1f} MB may be in memory",
        ]
    )


def command(config: MoeServe) -> None:
    """Serve a carved language model: upcycle3d moe serve DIR --budget 200MB --policy expert_aware --cache belady --port 8000."""
    require(0 <= config.port < 65_536, f"--port must be in 0..65535, found {config.port}")
    require_numbers("--grace", least=0.0, most=86_400.0, grace=config.grace)
    settings = serving_config(config)
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InvalidInput(
            "moe serve needs the packages starlette, uvicorn and prometheus_client; pip install -c constraints.txt -e '.[serve]'"
        ) from error
    serve(config, settings, HuggingFaceCoder(config.folder))


def serve(config: MoeServe, settings: ServingConfig, coder: TextCoder) -> None:
    """Serve until Ctrl-C or SIGTERM: open requests end, the report is printed, and the call returns.

    Args:
        config: The options.
        settings: What `serving_config` read from them.
        coder: The tokenizer.

    Raises:
        InvalidInput: The folder cannot be served.
    """
    import uvicorn

    served = open_served(config.folder)
    console.print(describe(served, settings), soft_wrap=True)
    server = CompletionServer(served, coder, settings)
    try:
        app = completions_app(server, grace=config.grace)
        console.print(f"listening at http://{config.host}:{config.port}/v1/completions; Ctrl-C ends it", soft_wrap=True)
        grace = max(1, round(config.grace))
        with _signals_that_do_not_kill():
            uvicorn.run(app, host=config.host, port=config.port, log_level="warning", timeout_graceful_shutdown=grace)
    finally:
        report = server.close(grace=0)
    console.print(str(report), soft_wrap=True)


@contextmanager
def _signals_that_do_not_kill() -> Iterator[None]:
    """uvicorn ends well at Ctrl-C and SIGTERM, and then raises the signal again: that must not end the process before its report."""
    kept = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(run_command(command))

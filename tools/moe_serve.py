"""`upcycle3d moe serve`: answer requests with a carved language model or detector whose experts come from the disk as they are needed.

Read next: `perception/moe/serving/completions.py` and `perception/moe/driving/detections.py`, the endpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..core.errors import require
from ..perception.moe.driving.carved_folder import CarvedDetector, is_carved_detector, open_carved_detector
from ..perception.moe.driving.detection_server import DetectionServer
from ..perception.moe.driving.detections import detections_app
from ..perception.moe.runtime.scheduling import BatchLimits
from ..perception.moe.serving.completion_server import CompletionServer, ServingConfig
from ..perception.moe.serving.completions import completions_app
from ..perception.moe.serving.engine_server import RuntimeConfig
from ..perception.moe.serving.hugging_face_coder import HuggingFaceCoder
from ..perception.moe.serving.llama_engine import LlamaLimits
from ..perception.moe.serving.served_models import ServedModel, open_served
from ..perception.moe.serving.text_stream import TextCoder
from .console import console, run_command
from .http_service import check_packages, check_service, run_service
from .serving_options import CacheName, PolicyName, cache_of, policy_of, read_bytes


@dataclass(frozen=True, kw_only=True)
class MoeServe:
    """Serve a carved language model behind `/v1/completions`, or a carved detector behind `/v1/detections`, with `/v1/models`, `/health`
    and `/metrics`, until Ctrl-C or SIGTERM."""

    folder: tyro.conf.Positional[Path]
    """What `upcycle3d moe readme` wrote for a language model (its `model` folder), or `upcycle3d moe carve` for a detector."""
    budget: str
    """Experts that memory holds, such as 200MB. What is always in memory comes on top, and the command prints it."""
    policy: PolicyName = "expert_aware"
    """What fills batches."""
    cache: CacheName = "belady"
    """What decides which experts go."""
    whole: bool = False
    """Load experts as a whole instead of layer by layer. All experts of a prompt must then fit into the budget together. Contexts of a
    detector are always loaded as a whole."""
    fetch_ahead: bool = True
    """Fetch experts before a batch waits for them."""
    foreseen: int = 1
    """Batches that are foreseen."""
    tokens: int = 2048
    """Tokens that a batch holds; a longer prompt is refused. Of a detector, a batch holds 16 scans."""
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


SCANS_PER_BATCH = 16
"""Scans that a batch of a detector holds. They are computed one after the other, so this is how far contexts are sorted."""


def detector_config(config: MoeServe) -> RuntimeConfig:
    """Read how a detector is served.

    Args:
        config: The options.

    Returns:
        The configuration of the server.

    Raises:
        InvalidInput: A number is out of range, or an option belongs to language models.
    """
    plain = MoeServe(folder=config.folder, budget=config.budget)
    for option in ("whole", "tokens", "longest", "keys_values"):
        given, usual = getattr(config, option), getattr(plain, option)
        require(given == usual, f"--{option.replace('_', '-')} belongs to language models, and {config.folder} holds a detector")
    return RuntimeConfig(
        budget=read_bytes(config.budget, "--budget"),
        policy=policy_of(config.policy),
        eviction=cache_of(config.cache),
        fetch_ahead=config.fetch_ahead,
        foreseen=config.foreseen,
        batch=BatchLimits(tokens=SCANS_PER_BATCH),
        most_requests=config.most_requests,
    )


def describe_detector(opened: CarvedDetector, config: RuntimeConfig) -> str:
    """Say what will be in memory.

    Args:
        opened: The carved detector.
        config: How it is served.

    Returns:
        Some lines.
    """
    own, count = opened.context_bytes, len(opened.description.contexts)
    return "\n".join(
        [
            f"{opened.detector.label}: {opened.description}",
            f"a scan is float32 rows of {', '.join(opened.columns)} in the frame of the sensor ({opened.rig})",
            f"always in memory: {opened.common_bytes / 1e6:.2f} MB",
            f"{count} contexts of {own / 1e6:.2f} MB on the disk, of which {config.budget / 1e6:.2f} MB may be in memory",
        ]
    )


def command(config: MoeServe) -> None:
    """Serve a carved language model or detector: upcycle3d moe serve DIR --budget 200MB --policy expert_aware --cache belady --port 8000."""
    check_service(port=config.port, grace=config.grace)
    if is_carved_detector(config.folder):
        detector_settings = detector_config(config)
        check_packages()
        serve_detector(config, detector_settings)
        return
    settings = serving_config(config)
    check_packages()
    serve(config, settings, lambda: HuggingFaceCoder(config.folder))


def serve(config: MoeServe, settings: ServingConfig, make_coder: Callable[[], TextCoder]) -> None:
    """Serve a language model until Ctrl-C or SIGTERM: open requests end, the report is printed, and the call returns.

    Args:
        config: The options.
        settings: What `serving_config` read from them.
        make_coder: Loads the tokenizer, after the files of the model were found good.

    Raises:
        InvalidInput: The folder cannot be served.
    """
    served = open_served(config.folder)
    console.print(describe(served, settings), soft_wrap=True)
    server = CompletionServer(served, make_coder(), settings)
    try:
        app = completions_app(server, grace=config.grace)
        run_service(app, "/v1/completions", host=config.host, port=config.port, grace=config.grace)
    finally:
        report = server.close(grace=0)
    console.print(str(report), soft_wrap=True)


def serve_detector(config: MoeServe, settings: RuntimeConfig) -> None:
    """Serve a detector until Ctrl-C or SIGTERM: open requests end, the report is printed, and the call returns.

    Args:
        config: The options.
        settings: What `detector_config` read from them.

    Raises:
        InvalidInput: The folder cannot be served.
    """
    opened = open_carved_detector(config.folder)
    console.print(describe_detector(opened, settings), soft_wrap=True)
    server = DetectionServer(opened, settings, keep_cached=config.keep_cached)
    try:
        app = detections_app(server, grace=config.grace)
        run_service(app, "/v1/detections", host=config.host, port=config.port, grace=config.grace)
    finally:
        report = server.close(grace=0)
    console.print(str(report), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(command))

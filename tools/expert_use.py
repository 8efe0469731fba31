"""How the experts of an upcycled head were used, as a table."""

from __future__ import annotations

from ..perception.models.decoders.mixture import MixtureDecoder
from ..perception.models.detector import Detector
from .console import print_table, print_warning


def print_expert_use(detector: Detector) -> dict[str, object]:
    """Print one row per router: the share of each expert since the detector was loaded, and how even the shares are.

    Args:
        detector: Any detector; nothing is printed for a dense one.

    Returns:
        The same for a JSON report, under `experts`; empty for a dense detector.
    """
    decoder = detector.decoder
    if not isinstance(decoder, MixtureDecoder):
        return {}
    names, rows, report = decoder.config.experts, [], {}
    for place, counter in decoder.usages():
        use = counter.value
        rows.append((place, use.tokens, *(f"{share:.1%}" for share in use.shares), f"{use.entropy:.2f}"))
        report[place] = {"tokens": use.tokens, "shares": dict(zip(names, use.shares, strict=True)), "entropy": use.entropy}
        if use.tokens and use.dead:
            print_warning(f"nothing at {place} chose {', '.join(names[expert] for expert in use.dead)}")
    print_table("use of the experts", ("router", "tokens", *names, "evenness"), rows)
    return {"experts": report}

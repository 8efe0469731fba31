"""How the experts of an upcycled head were used, as a table."""

from __future__ import annotations

from ..perception.models.decoders.mixture import HeadMixtureConfig, MixtureDecoder
from ..perception.models.detector import Detector
from .console import console, print_table, print_warning


def all_compute(head: HeadMixtureConfig) -> str:
    """Say that nothing is chosen, where every expert computes everything.

    Args:
        head: Structure of a head.

    Returns:
        One sentence; empty where experts are chosen.
    """
    if head.active < len(head.experts) or len(head.experts) < 2:
        return ""
    experts = "both experts compute" if len(head.experts) == 2 else f"all {len(head.experts)} experts compute"
    per_region = head.regions != "none" and head.decides_per == "region"
    what = "every region" if per_region and not head.bev_blocks else "every scene and region" if per_region else "every scene"
    if head.router == "uniform":
        return f"{experts} {what}, and each counts the same"
    return f"{experts} {what}; {'the routers only weigh' if per_region else 'the gate only weighs'} them"


def print_expert_use(detector: Detector) -> dict[str, object]:
    """Print a row per router and expert: shares of choices, where its weight is the largest, and its mean weight since the detector was loaded.

    Args:
        detector: Any detector; nothing is printed for a dense one.

    Returns:
        The same for a JSON report, under `experts`; empty for a dense detector.
    """
    decoder = detector.decoder
    if not isinstance(decoder, MixtureDecoder):
        return {}
    head, report = decoder.config, {}
    names, rows = head.experts, []
    every = all_compute(head)
    for place, counter in decoder.usages():
        use = counter.value
        by_expert = zip(names, use.shares, use.largest_shares, use.mean_weights, strict=True)
        rows += [
            (place, use.tokens, name, "all" if every else f"{share:.1%}", f"{largest:.1%}", f"{weight:.3f}")
            for name, share, largest, weight in by_expert
        ]
        report[place] = {
            "tokens": use.tokens,
            "shares": dict(zip(names, use.shares, strict=True)),
            "largest weight": dict(zip(names, use.largest_shares, strict=True)),
            "mean weight": dict(zip(names, use.mean_weights, strict=True)),
            "entropy": use.entropy,
        }
        if use.tokens and use.dead:
            print_warning(f"nothing at {place} chose {', '.join(names[expert] for expert in use.dead)}")
    if not any(counter.value.tokens for _, counter in decoder.usages()):
        return {"experts": report}
    header = ("router", "scenes or regions", "expert", "share of choices", "largest weight in", "mean weight")
    print_table("use of the experts", header, rows)
    if every:
        console.print(f"{every}: read the weights, not the choices", soft_wrap=True)
    return {"experts": report}


class ScanExperts:
    """Notes the weight of each expert in each scan, where a head decides per scene."""

    def __init__(self, detector: Detector) -> None:
        """Begin without a scan.

        Args:
            detector: Any detector; of a dense one, and of a head that decides per region, nothing is noted.
        """
        decoder = detector.decoder
        self._decoder = decoder if isinstance(decoder, MixtureDecoder) and decoder.gate is not None else None
        self._before = self._sums()
        self.weights: dict[str, dict[str, float]] = {}

    def note(self, scan: str) -> None:
        """Keep the weights of the scan that was detected last.

        Args:
            scan: Its name.
        """
        now, before = self._sums(), self._before
        self._before = now
        if self._decoder is not None and now != before:
            given = (after - earlier for after, earlier in zip(now, before, strict=True))
            self.weights[scan] = {n: round(w, 4) for n, w in zip(self._decoder.config.experts, given, strict=True)}

    def _sums(self) -> tuple[float, ...]:
        return () if self._decoder is None else self._decoder.gate_usage.value.weight

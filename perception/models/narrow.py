"""A detector with fewer channels inside its decoder: an ordinary detector, smaller and faster, with the encoder of the dense one.

Read next: `decoders/channels.py`, which says which channels can go; `perception/moe/driving/`, which chooses them by driving context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.errors import InvalidInput, require, require_counts
from .decoders.channels import ChannelSite, channel_sites, keep_channels
from .decoders.decoder import Decoder
from .derived import DerivedDetectorConfig
from .detector import Detector


@dataclass(frozen=True, kw_only=True)
class KeptChannels:
    """How many units of one site are left."""

    site: str
    """Name of the convolution whose outputs they are."""
    count: int
    """Number of units."""

    def __post_init__(self) -> None:
        require_counts("KeptChannels", count=self.count)


@dataclass(frozen=True, kw_only=True)
class NarrowDetectorConfig(DerivedDetectorConfig):
    """Configuration of a detector with fewer channels. Field names are stored in detector files."""

    kept: tuple[KeptChannels, ...]
    """What is left of each site that is smaller than in the dense detector."""

    @property
    def label(self) -> str:
        """Name of this kind of detector in messages and reports."""
        return f"{self.detector.label} with fewer channels"

    def sites(self, dense: Decoder) -> dict[str, ChannelSite]:
        """Find the sites that are smaller.

        Args:
            dense: The decoder of the dense detector.

        Returns:
            The sites by their names.

        Raises:
            InvalidInput: The decoder has no such site, or it has fewer units.
        """
        there = {site.name: site for site in channel_sites(dense)}
        for one in self.kept:
            if one.site not in there:
                raise InvalidInput(f"the decoder has no channels {one.site!r} to leave out; there are {', '.join(there)}")
            width = there[one.site].width
            require(one.count <= width, f"the site {one.site!r} has {width} units, and {one.count} are to be left")
        return {one.site: there[one.site] for one in self.kept}

    def build(self) -> Detector:
        """Make the detector with fresh weights.

        Returns:
            The detector, in training mode.
        """
        inner = self.detector.build()
        sites = self.sites(inner.decoder)
        keep_channels(inner.decoder, {sites[one.site]: torch.arange(one.count) for one in self.kept})
        return Detector(inner.encoder, inner.decoder, self.class_names, self.label, self)

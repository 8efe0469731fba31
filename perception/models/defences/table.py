"""The defences that there are. A new one adds one line here."""

from __future__ import annotations

from .bottleneck import BottleneckConfig
from .cells import DecoyConfig, DropConfig, JitterConfig
from .noise import NoiseConfig, RoundingConfig
from .obfuscator import ObfuscatorConfig
from .region import RegionConfig

DefenceConfig = (
    RegionConfig | DropConfig | JitterConfig | DecoyConfig | NoiseConfig | RoundingConfig | BottleneckConfig | ObfuscatorConfig
)
"""Every defence that an encoder file may hold. `config.build(spec)` makes it."""

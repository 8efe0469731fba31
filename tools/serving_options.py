"""The options that `upcycle3d moe serve` and `moe simulate` share: sizes in bytes, and the names of policies and caches.

Read next: `perception/moe/runtime/scheduling.py` and `expert_cache.py`, which explain what the names stand for.
"""

from __future__ import annotations

import re
from typing import Literal

from ..core.errors import InvalidInput
from ..core.foreign_text import shown
from ..perception.moe.runtime import scheduling
from ..perception.moe.runtime.expert_cache import Belady, Eviction, Lfu, Lru, RandomVictim
from ..perception.moe.runtime.scheduling import BatchPolicy

PolicyName = Literal["expert_aware", "resident_first", "oldest_leads", "first_in_first_out", "decoding_first", "prefill_first"]
CacheName = Literal["belady", "lru", "lfu", "random"]
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(B|kB|KB|MB|GB|TB)?")
_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def read_bytes(text: str, option: str) -> int:
    """Read a size.

    Args:
        text: Such as `200MB`, `1.5GB` or `300000`.
        option: Name of the option, for the message.

    Returns:
        Bytes.

    Raises:
        InvalidInput: It is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise InvalidInput(f"{option} takes a size such as 200MB, 1.5GB or a number of bytes, found {shown(text)!r}")
    return round(float(found[1]) * _UNITS[found[2] or ""])


def policy_of(name: PolicyName) -> BatchPolicy:
    """Find the policy of a name.

    Args:
        name: The name.

    Returns:
        The function that fills batches.
    """
    policies: dict[PolicyName, BatchPolicy] = {
        "expert_aware": scheduling.expert_aware,
        "resident_first": scheduling.resident_first,
        "oldest_leads": scheduling.oldest_leads,
        "first_in_first_out": scheduling.first_in_first_out,
        "decoding_first": scheduling.decoding_first,
        "prefill_first": scheduling.prefill_first,
    }
    return policies[name]


def cache_of(name: CacheName, seed: int = 0) -> Eviction:
    """Find the cache rule of a name.

    Args:
        name: The name.
        seed: Decides the draws of `random`.

    Returns:
        The rule.
    """
    rules: dict[CacheName, Eviction] = {"belady": Belady(), "lru": Lru(), "lfu": Lfu(), "random": RandomVictim(seed=seed)}
    return rules[name]

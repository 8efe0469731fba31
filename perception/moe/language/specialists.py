"""Specialists of a language model: trained on one domain each, kept on disk with what their weights come from, and read again.

Read next: `language_upcycling.py`, which mixes them.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from ....core.config_json import Json, config_to_json, first_difference
from ....core.errors import InvalidInput
from ....core.new_folder import new_folder, require_empty
from ....core.tensor_file import content_digest
from ....core.text_files import read_text
from ..checkpoints.transformers_package import without_progress_bars
from ..surgery.common_seed import require_same_structure
from .language_models import LanguageModel, copy_tokenizer, load_language_model
from .phases import TextPhase, speaker, train_on
from .text_training import TokenDomains

ORIGIN_NAME = "origin.json"
"""File beside a specialist's weights: the seed and the texts by their SHA-256, the training and what it took."""
_SECONDS = "cpu_seconds"


@dataclass(frozen=True, kw_only=True, eq=False)
class Specialist:
    """A specialist on disk."""

    name: str
    """Its name: that of its domain, or of its folder."""
    folder: Path
    """Its Hugging Face folder."""
    model: nn.Module
    """The model in evaluation mode."""
    cpu_seconds: float | None = None
    """CPU time of its training; None where nobody stored it."""


def train_specialists(
    seed: LanguageModel,
    domains: TokenDomains,
    phase: TextPhase,
    folder: Path,
    *,
    general: str | None,
    share: float = 0.1,
    say: Callable[[str], None] = print,
) -> list[Specialist]:
    """Train one specialist of the seed for every domain but the general one.

    Finished specialists are kept, and one whose training was stopped goes on, so the work can be continued.

    Args:
        seed: The dense model.
        domains: Tokens by domain.
        phase: Training of one specialist.
        folder: Where the specialists go, each as a Hugging Face folder.
        general: Domain of which a share is mixed into each specialist, against forgetting; None for none.
        share: That share.
        say: Gets lines about each specialist.

    Returns:
        The specialists.

    Raises:
        InvalidInput: A folder holds a specialist of another seed, other texts or other training, or something else, or is damaged.
    """
    of_seed = content_digest(seed.model.state_dict())
    plans: dict[str, tuple[dict[str, float], TextPhase, dict[str, Json]]] = {}
    found: dict[str, Specialist] = {}
    for number, name in enumerate(specialist_names(domains.tokens, general)):
        shares = {name: 1.0} if general is None else {name: 1 - share, general: share}
        own = replace(phase, seed=phase.seed * 31 + number)
        plans[name] = shares, own, _origin(of_seed, {part: domains.tokens[part] for part in shares}, shares, own)
        target = folder / name
        if not (target / "config.json").is_file():
            require_empty(target)
            continue
        _require_origin(target, plans[name][2])  # what is wrong with those that are there is said before others are trained
        say(f"specialist {name}: {target} is there and was trained like this; it is kept")
        found[name] = _read(name, target, "delete this folder, and the specialist is trained again")
    for name, (shares, own, wanted) in plans.items():
        if name in found:
            continue
        model, target, unfinished = copy.deepcopy(seed.model), folder / name, folder / f"{name}.unfinished.safetensors"
        tell = speaker(say, f"specialist {name}")
        record = train_on(model, domains, shares, own, say=tell, kept_at=unfinished)
        write_dense(model, target, seed.folder, origin={**wanted, _SECONDS: record.cpu_seconds})
        unfinished.unlink(missing_ok=True)
        tell(str(record))
    return [found.get(name) or _read(name, folder / name, "train it again") for name in plans]


def specialist_names(texts: Iterable[str], general: str | None) -> list[str]:
    """Name the specialists that texts train.

    Args:
        texts: Names of the texts.
        general: Name of the general one, which gets no specialist.

    Returns:
        The names.
    """
    return [name for name in texts if name != general]


def read_specialists(folders: Sequence[Path]) -> list[Specialist]:
    """Load the specialists of a seed.

    Args:
        folders: Their Hugging Face folders.

    Returns:
        The specialists, named as their folders. Folders of one name get the name of the folder above in front.
    """
    return [
        _read(name, folder, "give another specialist, or leave this one out")
        for name, folder in zip(folder_names(folders), folders)
    ]


def require_fitting(seed: LanguageModel, specialists: Sequence[Specialist]) -> None:
    """Refuse specialists that differ from the seed in anything but their weights.

    Args:
        seed: The dense model.
        specialists: Its specialists.

    Raises:
        InvalidInput: One has another structure; the message names its folder and the first difference.
    """
    for one in specialists:
        try:
            require_same_structure([seed.model, one.model])
        except InvalidInput as error:
            raise InvalidInput(
                f"the specialist {one.name} in {one.folder} was not trained from the seed in {seed.folder}, model 0 of what follows: {error}"
            ) from error


def folder_names(folders: Sequence[Path]) -> list[str]:
    """Name specialists by their folders.

    Args:
        folders: The folders.

    Returns:
        The last part of each path, and more of it where these are equal.
    """
    paths = [folder.resolve() for folder in folders]
    deepest = max((len(path.parts) for path in paths), default=1)
    for parts in range(1, deepest):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read(name: str, folder: Path, advice: str) -> Specialist:
    try:
        model = load_language_model(folder, tokenizer=False).model
    except InvalidInput as error:
        raise InvalidInput(f"the specialist {name} cannot be used: {error}. Or {advice}") from error
    return Specialist(name=name, folder=folder, model=model, cpu_seconds=_stored_seconds(folder))


def _stored_seconds(folder: Path) -> float | None:
    """CPU seconds that were stored beside a specialist; None where there are none."""
    try:
        seconds = json.loads(read_text(folder / ORIGIN_NAME, "origin of a specialist")).get(_SECONDS)
    except (InvalidInput, ValueError, AttributeError):
        return None
    return float(seconds) if isinstance(seconds, int | float) and math.isfinite(seconds) else None


def _origin(seed: str, tokens: Mapping[str, Tensor], shares: Mapping[str, float], phase: TextPhase) -> dict[str, Json]:
    """What decides the weights of a specialist."""
    texts: dict[str, Json] = {name: content_digest({name: part}) for name, part in tokens.items()}
    return {
        "seed": seed,
        "texts": texts,
        "shares": dict(shares),
        "training": config_to_json(phase),
    }


def _require_origin(folder: Path, wanted: Json) -> None:
    advice = "give another --out, the same options as then, or delete the folder to train it again"
    try:
        stored = json.loads(read_text(folder / ORIGIN_NAME, "origin of a specialist"))
    except (InvalidInput, ValueError) as error:
        raise InvalidInput(f"{folder} holds a model without a readable {ORIGIN_NAME}: {error}; {advice}") from error
    if isinstance(stored, dict):
        stored.pop(_SECONDS, None)  # what it took decides nothing
    difference = first_difference(stored, json.loads(json.dumps(wanted)))
    if difference is not None:
        raise InvalidInput(f"{folder} holds another specialist: {difference}; {advice}")


def write_dense(model: nn.Module, folder: Path, source: Path, *, origin: Json = None) -> None:
    """Write a dense Hugging Face model so that its folder appears complete.

    Args:
        model: The model.
        folder: The new folder; it must not exist, or be empty.
        source: Folder whose tokenizer is copied.
        origin: What the weights come from, to be stored beside them.

    Raises:
        InvalidInput: The folder holds something. Nothing is written then.
        OSError: The folder cannot be written.
    """
    with new_folder(folder) as work:
        with without_progress_bars():
            model.save_pretrained(work)  # type: ignore[operator]
        copy_tokenizer(source, work)
        if origin is not None:
            (work / ORIGIN_NAME).write_text(json.dumps(origin, indent=1))

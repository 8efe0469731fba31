"""Specialists of a language model: trained on one domain each, kept on disk with what their weights come from, and read again.

Read next: `language_upcycling.py`, which mixes them.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from ....core.config_json import Json, config_to_json, first_difference
from ....core.errors import InvalidInput
from ....core.tensor_file import content_digest
from ....core.text_files import read_text
from .language_models import LanguageModel, copy_tokenizer, load_language_model
from .phases import TextPhase, train_on
from .text_training import TokenDomains

ORIGIN_NAME = "origin.json"
"""File beside a specialist's weights: the seed and the texts by their SHA-256, and the training."""


def train_specialists(
    seed: LanguageModel,
    domains: TokenDomains,
    phase: TextPhase,
    folder: Path,
    *,
    general: str | None,
    share: float = 0.1,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Train one specialist of the seed for every domain but the general one. Finished specialists are kept, so the work can be continued.

    Args:
        seed: The dense model.
        domains: Tokens by domain.
        phase: Training of one specialist.
        folder: Where the specialists go, each as a Hugging Face folder.
        general: Domain of which a share is mixed into each specialist, against forgetting; None for none.
        share: That share.
        say: Gets one line per specialist.

    Returns:
        The folders of the specialists.

    Raises:
        InvalidInput: A folder holds a specialist of another seed, other texts or other training, or something else.
    """
    found, of_seed = [], content_digest(seed.model.state_dict())
    for number, name in enumerate(n for n in domains.tokens if n != general):
        target = folder / name
        shares = {name: 1.0} if general is None else {name: 1 - share, general: share}
        own = replace(phase, seed=phase.seed * 31 + number)
        wanted = _origin(of_seed, {part: domains.tokens[part] for part in shares}, shares, own)
        if (target / "config.json").is_file():
            _require_origin(target, wanted)
            say(f"specialist {name}: {target} is there and was trained like this; it is kept")
        else:
            require_empty(target)
            model = copy.deepcopy(seed.model)
            record = train_on(model, domains, shares, own)
            write_dense(model, target, seed.folder, origin=wanted)
            say(f"specialist {name}: {record}")
        found.append(target)
    return found


def read_specialists(folders: Sequence[Path]) -> list[nn.Module]:
    """Load the specialists of a seed.

    Args:
        folders: Their Hugging Face folders.

    Returns:
        The models.
    """
    return [load_language_model(folder, tokenizer=False).model for folder in folders]


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
        model.save_pretrained(work)  # type: ignore[operator]
        copy_tokenizer(source, work)
        if origin is not None:
            (work / ORIGIN_NAME).write_text(json.dumps(origin, indent=1))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder that appears complete when the block ends, or not at all when it raises.

    Args:
        folder: The folder; it must not exist, or be empty.

    Yields:
        Where to write until then.

    Raises:
        InvalidInput: The folder holds something.
        OSError: The folder cannot be written.
    """
    require_empty(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        work = Path(temporary) / "model"
        work.mkdir()
        yield work
        if folder.exists():
            folder.rmdir()
        work.rename(folder)


def require_empty(folder: Path) -> None:
    """Refuse a folder that holds something: it could be somebody's model, or the result of other options.

    Args:
        folder: The folder that a model shall be written to.

    Raises:
        InvalidInput: It exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"{folder} is there already and is not empty; move it away or delete it, or choose another place")

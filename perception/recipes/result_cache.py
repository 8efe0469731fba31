"""Results of an experiment in a folder, one file per name and seed, so that hours of work survive an interruption.

    FOLDER/comparison.json         the configuration that all results of the folder share
    FOLDER/NAME_seedSEED.json      one result, with the digest of the configuration and the environment that made it

A file appears complete, by a rename, or not at all. So an experiment that was stopped, also by `kill -9`, goes on with the first
result that is missing, and more names and seeds can be added later.

Read next: `upcycling_experiment.py` and `category_shift.py`, which fill such folders, and `result_csv.py`, which publishes them.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from ...core.config_json import Json, first_difference
from ...core.errors import InvalidInput, require
from ...core.files import write_atomically
from ...core.strict_json import read_json
from ...datasets.fingerprint import as_recorded
from ..training.environment import describe_environment

COMPARISON_FILE = "comparison.json"


class ResultCache:
    """The results of one configuration in a folder.

    Example:
        cache = ResultCache(Path("runs/x/results"), {"frames": 200})
        scores = cache.read_or_make("upcycling", 0, lambda: {"AP": 17.1})
    """

    def __init__(self, folder: Path | str, configuration: Mapping[str, Json]) -> None:
        """Open a folder of results, or make it the folder of this configuration.

        Args:
            folder: Folder of the results. It is made if it does not exist.
            configuration: Everything that decides a result besides its name and seed, as plain JSON values.

        Raises:
            InvalidInput: The folder holds results of another configuration. The message names the first difference.
        """
        self.folder = Path(folder)
        # Through JSON and back: a tuple is stored as a list, and must compare equal to it.
        self.configuration: dict[str, Json] = json.loads(json.dumps(dict(configuration)))
        path = self.folder / COMPARISON_FILE
        if not path.exists():
            write_atomically(path, (json.dumps(self.configuration, indent=1) + "\n").encode())
        stored = _read_json(path)
        self.configuration = json.loads(as_recorded(json.dumps(self.configuration), json.dumps(stored)))
        difference = first_difference(stored, self.configuration)
        if difference:
            raise InvalidInput(f"{self.folder} holds results of another configuration ({difference}); choose another folder")

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the configuration. Every result file names it."""
        return hashlib.sha256(json.dumps(self.configuration, sort_keys=True).encode()).hexdigest()[:16]

    def path(self, name: str, seed: int) -> Path:
        """Where a result lies.

        Args:
            name: Name of the result, as `upcycling`.
            seed: Seed of the result.

        Returns:
            The file, which may not exist.

        Raises:
            InvalidInput: The name has characters other than letters, digits, `-` and `_`.
        """
        require(re.fullmatch(r"[\w-]+", name) is not None, f"a result's name has letters, digits, - and _ only; found {name!r}")
        return self.folder / f"{name}_seed{seed}.json"

    def has(self, name: str, seed: int) -> bool:
        """Whether a result is there.

        Args:
            name: Name of the result.
            seed: Seed of the result.

        Returns:
            True if `read` will find it.
        """
        return self.path(name, seed).exists()

    def write(self, name: str, seed: int, result: Json) -> None:
        """Store a result, with the environment of this process.

        Args:
            name: Name of the result.
            seed: Seed of the result.
            result: Plain JSON values.
        """
        stored = {
            "name": name,
            "seed": seed,
            "configuration": self.digest,
            "environment": describe_environment(command=sys.orig_argv, seed=seed),
            "result": result,
        }
        write_atomically(self.path(name, seed), (json.dumps(stored, indent=1) + "\n").encode())

    def read(self, name: str, seed: int) -> Json:
        """Read a stored result.

        Args:
            name: Name of the result.
            seed: Seed of the result.

        Returns:
            What `write` was given.

        Raises:
            InvalidInput: The file is damaged, or it was made with another configuration and moved here.
        """
        return self._read_file(self.path(name, seed))["result"]

    def read_or_make(self, name: str, seed: int, make: Callable[[], Json]) -> Json:
        """Read a stored result, or make and store it.

        Args:
            name: Name of the result.
            seed: Seed of the result.
            make: Called only if the result is not there.

        Returns:
            The result as read from its file, so that a new one and an old one have the same types.
        """
        if not self.has(name, seed):
            self.write(name, seed, make())
        return self.read(name, seed)

    def stored(self) -> dict[tuple[str, int], dict[str, Json]]:
        """All finished results with what is stored beside them: `result` and `environment`, by (name, seed)."""
        found = {}
        for path in self.folder.glob("*_seed*.json"):
            name, _, seed = path.stem.rpartition("_seed")
            if re.fullmatch(r"-?\d+", seed):
                found[name, int(seed)] = self._read_file(path)
        return dict(sorted(found.items()))

    def _read_file(self, path: Path) -> dict[str, Json]:
        stored = _read_json(path)
        found = stored.get("configuration") if isinstance(stored, dict) else None
        if found != self.digest or "result" not in stored:
            raise InvalidInput(
                f"{path} is not a result of this configuration (digest {self.digest}, found {found}); move it out of the folder"
            )
        return stored


def _read_json(path: Path) -> Json:
    return read_json(path, "a stored result", remedy="delete it, and its result is computed again", kind=object, allow_nan=True)

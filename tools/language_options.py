"""The options that `upcycle3d moe bam` and `moe baseline` share: the texts, the specialists and the two phases of training.

Read next: `perception/moe/language/language_upcycling.py`, which does the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from torch import Tensor, nn

from ..core.errors import InvalidInput, require
from ..core.files import locked_folder
from ..core.new_folder import require_empty
from ..perception.moe.language.language_models import LanguageModel, named_texts, require_model_folder
from ..perception.moe.language.phases import TextPhase, held_out, token_domains, train_on
from ..perception.moe.language.specialists import (
    Specialist,
    read_specialists,
    specialist_names,
    train_specialists,
)
from ..perception.moe.language.text_scores import check_row
from ..perception.moe.language.text_training import PhaseRecord, TextTraining, TokenDomains, router_loss_text
from ..perception.moe.layers.precision import Precision
from .console import console


class Texts(NamedTuple):
    """The tokens of all domains."""

    train: TokenDomains | None
    """What is trained on; None without texts."""
    tests: dict[str, Tensor]
    """What is measured on, per domain; empty without texts."""
    whole: dict[str, Tensor]
    """All tokens of each domain."""


@dataclass(frozen=True, kw_only=True)
class LanguageOptions:
    """Texts, specialists and training of a language mixture."""

    specialists: tuple[Path, ...] = ()
    """Folders of models that were trained further from the seed. Without them, specialists are trained on the texts. The seed is one of the
    models that are mixed, too."""
    texts: tuple[str, ...] = ()
    """Domains as NAME=FILE. They train specialists and the result, and their last tenth measures both."""
    general: str | None = None
    """Name of the text of which a tenth is mixed into every specialist, against forgetting. It gets no specialist: the seed is its expert."""
    only: tuple[str, ...] = ()
    """Names or patterns of the parts to replace, such as `model.layers.2?.*`; all by default."""
    specialist_steps: int = 200
    """Steps of each specialist, or of each owner of `flexolmo`."""
    specialist_lr: float = 1e-4
    """Learning rate of specialists and owners."""
    mix_steps: int = 200
    """Steps of the result on all texts in equal shares; 0 only builds it."""
    mix_lr: float = 1e-4
    """Learning rate of these steps."""
    batch: int = 4
    """Rows per step."""
    length: int = 256
    """Tokens per row."""
    precision: Precision = "float32"
    """Type of the matrix products in training. `bfloat16` is several times faster on processors with units for it. Scores are in float32."""
    seed: int = 0
    """Decides routers and batches."""
    plan_only: bool = False
    """Print what would be replaced and what it costs, and stop. Nothing is trained or written."""

    def check(self, method: str, *, mixes: bool, trains: bool, owners: bool = False) -> Mapping[str, Path]:
        """Refuse everything that the options alone show to be wrong, before a model is loaded.

        Args:
            method: The method, for messages.
            mixes: Whether it mixes specialists.
            trains: Whether its result is trained on all texts.
            owners: Whether it trains owners.

        Returns:
            File of each text.

        Raises:
            InvalidInput: A number is out of range, a text or a specialist is missing or named twice, or an option would change nothing.
        """
        for option, number, least in (
            ("--batch", self.batch, 1),
            ("--length", self.length, 2),
            ("--specialist-steps", self.specialist_steps, 0),
            ("--mix-steps", self.mix_steps, 0),
            ("--seed", self.seed, 0),
        ):
            require(least <= number < 1 << 31, f"{option} must be a whole number from {least} to {(1 << 31) - 1}, found {number}")
        for option, rate in (("--specialist-lr", self.specialist_lr), ("--mix-lr", self.mix_lr)):
            require(0 <= rate <= 1e6, f"{option} must be a number from 0 to 1e6, found {rate}")
        files = named_texts(self.texts)
        self._check_sources(method, mixes, list(files))
        learns = bool(files) and (owners or (mixes and not self.specialists))
        joint = bool(files) and trains
        default = LanguageOptions()
        for option, given, used in (
            ("--specialist-steps", self.specialist_steps not in (default.specialist_steps, 0), learns),
            ("--specialist-lr", self.specialist_lr != default.specialist_lr, learns),
            ("--mix-steps", self.mix_steps not in (default.mix_steps, 0), joint),
            ("--mix-lr", self.mix_lr != default.mix_lr, joint),
            ("--batch", self.batch != default.batch, learns or joint),
            ("--length", self.length != default.length, learns or joint),
            ("--precision", self.precision != default.precision, learns or joint),
        ):
            without = "" if files else " without --texts"
            require(used or not given, f"{option} changes nothing for {method} with these options{without}; leave it out")
        return files

    def _check_sources(self, method: str, mixes: bool, texts: list[str]) -> None:
        """Refuse texts and specialists that do not fit together."""
        require(
            self.general is None or not self.specialists,
            "--general belongs to the training of specialists, and --specialists gives trained ones; leave one of them out",
        )
        if self.general is not None and self.general not in texts:
            given = f"the texts are {', '.join(texts)}" if texts else "no text was given (--texts)"
            raise InvalidInput(f"--general names {self.general!r}, and {given}")
        if mixes and not self.specialists and not specialist_names(texts, self.general):
            raise InvalidInput(
                f"{method} mixes specialists, and there are none: give --specialists FOLDER ..., or --texts NAME=FILE ... to train "
                "specialists on (the --general text gets none)"
            )
        for folder in self.specialists:
            require_model_folder(folder)
        twice = {folder.resolve() for folder in self.specialists}
        require(len(twice) == len(self.specialists), "--specialists names one folder twice; name each specialist once")

    def specialist_phase(self) -> TextPhase:
        """Give the training of one specialist or owner.

        Returns:
            The phase.
        """
        return TextPhase(
            steps=self.specialist_steps,
            lr=self.specialist_lr,
            batch=self.batch,
            length=self.length,
            precision=self.precision,
            seed=self.seed,
        )

    def mix_phase(self) -> TextPhase:
        """Give the training of the result.

        Returns:
            The phase.
        """
        return TextPhase(
            steps=self.mix_steps,
            lr=self.mix_lr,
            batch=self.batch,
            length=self.length,
            precision=self.precision,
            seed=self.seed + 1,
        )

    def read_texts(self, source: LanguageModel, files: Mapping[str, Path], *, learns: bool, joint: bool) -> Texts:
        """Read the texts as tokens, and keep the last tenth of each for tests.

        Args:
            source: The model whose tokenizer reads them.
            files: File of each text, from `check`.
            learns: Whether specialists or owners are trained on them.
            joint: Whether the result is trained on them.

        Returns:
            The tokens.

        Raises:
            InvalidInput: A text cannot be read or is shorter than a row, or a row is longer than the model reads.
        """
        if not files:
            return Texts(train=None, tests={}, whole={})
        domains = token_domains(source, files)
        train, tests = held_out(domains)
        trains = bool((learns and self.specialist_steps) or (joint and self.mix_steps))
        for name, tokens in train.tokens.items() if trains else ():
            if len(tokens) < self.length:
                raise InvalidInput(
                    f"the text {name!r} has {len(tokens)} tokens to train on, which fill no row of {self.length}; lower --length or give "
                    "more text"
                )
        if trains:
            check_row(source.model, self.length)
        return Texts(train=train, tests=tests, whole=domains.tokens)

    def given_specialists(self) -> list[Specialist]:
        """Load the specialists that are given.

        Returns:
            The specialists; none where they are trained.
        """
        return read_specialists(self.specialists)

    def trained_specialists(self, source: LanguageModel, train: TokenDomains | None, folder: Path) -> list[Specialist]:
        """Train specialists on the texts.

        Args:
            source: The dense model.
            train: Tokens to train on.
            folder: Where they go. Those that are there are kept.

        Returns:
            The specialists; none without texts.
        """
        if train is None:
            return []
        return train_specialists(source, train, self.specialist_phase(), folder, general=self.general, say=console.print)

    def train_result(self, model: nn.Module, train: TokenDomains | None, kept_at: Path) -> PhaseRecord | None:
        """Train the result on all texts in equal shares, and say what the routers' losses do and how the loss went.

        Args:
            model: The result. It is changed.
            train: Tokens to train on; None without texts.
            kept_at: File with which a training that was stopped goes on.

        Returns:
            What the training did; None without texts or steps.
        """
        if train is None or not self.mix_steps:
            console.print(f"the result is not trained: {'no --texts were given' if train is None else '--mix-steps is 0'}")
            return None
        console.print(router_loss_text(model, TextTraining(steps=self.mix_steps)), soft_wrap=True)

        def say(text: str) -> None:
            console.print(f"joint training: {text}")

        record = train_on(model, train, dict.fromkeys(train.tokens, 1.0), self.mix_phase(), say=say, kept_at=kept_at)
        console.print(f"trained: {record}")
        return record


@contextmanager
def working_folder(out: Path) -> Iterator[None]:
    """Hold the folder of a job for this process, and refuse one that has a result already before anything is computed.

    Args:
        out: The folder of the job. It is made where needed.

    Yields:
        Nothing.

    Raises:
        InvalidInput: It holds a result.
        UpcycleError: Another process works there.
        OSError: It cannot be written.
    """
    require_empty(out / "model")
    with locked_folder(out, f"another process works on the job in {out}; wait for it to end, or give another --out"):
        yield


LanguageOption = Annotated[LanguageOptions, tyro.conf.arg(name="")]
"""`LanguageOptions` as options without a prefix."""

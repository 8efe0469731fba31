"""The options that `upcycle3d moe bam` and `moe baseline` share: the texts, the specialists and the two phases of training.

Read next: `perception/moe/language/language_upcycling.py`, which does the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from torch import Tensor, nn

from ..core.errors import InvalidInput, require
from ..core.files import locked_folder
from ..perception.moe.language.language_models import LanguageModel, check_row, named_texts
from ..perception.moe.language.phases import TextPhase, held_out, token_domains, train_on
from ..perception.moe.language.specialists import read_specialists, require_empty, train_specialists
from ..perception.moe.language.text_training import TextTraining, TokenDomains, router_loss_text
from ..perception.moe.layers.precision import Precision
from .console import console


class Texts(NamedTuple):
    """The tokens of all domains."""

    train: TokenDomains | None
    """What is trained on; None without texts."""
    tests: dict[str, Tensor]
    """What is measured on, per domain; empty without texts."""


@dataclass(frozen=True, kw_only=True)
class LanguageOptions:
    """Texts, specialists and training of a language mixture."""

    specialists: tuple[Path, ...] = ()
    """Folders of models that were trained further from the seed. Without them, specialists are trained on the texts."""
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

    def read_texts(self, source: LanguageModel) -> Texts:
        """Read the texts as tokens, and keep the last tenth of each for tests.

        Args:
            source: The model whose tokenizer reads them.

        Returns:
            The tokens.

        Raises:
            InvalidInput: A text cannot be read or is shorter than a row, a row is longer than the model reads, a number is out of range, or
                `general` names no text.
        """
        require(
            self.general is None or not self.specialists,
            "--general belongs to the training of specialists, and --specialists gives trained ones; leave one of them out",
        )
        # both phases are made here: what is wrong with the second one is said before the first one runs
        phases = (self.specialist_phase(), self.mix_phase())
        if not self.texts:
            require(self.general is None, f"--general names {self.general!r}, and no text was given (--texts)")
            return Texts(train=None, tests={})
        domains = token_domains(source, named_texts(self.texts))
        if self.general is not None and self.general not in domains.tokens:
            raise InvalidInput(f"--general names {self.general!r}, and the texts are {', '.join(domains.tokens)}")
        train, tests = held_out(domains)
        for name, tokens in train.tokens.items() if any(phase.steps for phase in phases) else ():
            if len(tokens) < self.length:
                raise InvalidInput(
                    f"the text {name!r} has {len(tokens)} tokens to train on, which fill no row of {self.length}; lower --length or give "
                    "more text"
                )
        if any(phase.steps for phase in phases):
            check_row(source.model, self.length)
        return Texts(train=train, tests=tests)

    def specialist_models(self, source: LanguageModel, train: TokenDomains | None, folder: Path) -> list[nn.Module]:
        """Load the specialists that are given, or train them on the texts.

        Args:
            source: The dense model.
            train: Tokens to train on; None without texts.
            folder: Where trained specialists go. Those that are there are kept.

        Returns:
            The models; none without specialists and texts.
        """
        folders = list(self.specialists)
        if not folders and train is not None:
            folders = train_specialists(source, train, self.specialist_phase(), folder, general=self.general, say=console.print)
        return read_specialists(folders)

    def train_result(self, model: nn.Module, train: TokenDomains | None) -> int:
        """Train the result on all texts in equal shares, and say what the routers' losses do and how the loss went.

        Args:
            model: The result. It is changed.
            train: Tokens to train on; None without texts.

        Returns:
            Number of steps; 0 without texts.
        """
        if train is None or not self.mix_steps:
            console.print(f"the result is not trained: {'no --texts were given' if train is None else '--mix-steps is 0'}")
            return 0
        console.print(router_loss_text(model, TextTraining(steps=self.mix_steps)), soft_wrap=True)
        record = train_on(model, train, dict.fromkeys(train.tokens, 1.0), self.mix_phase())
        console.print(f"trained: {record}")
        return self.mix_steps


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

"""Safetensors files of this program: written atomically with a hash, and checked completely before anything uses them.

A file holds named tensors and a few strings of metadata: a format name, a description in JSON, and the SHA-256 of the whole file.
Detectors, encoders, proposals, classifiers and rounds of pseudo labels are all kept this way. Nothing is pickled, and equal content
gives equal bytes (`safetensors_bytes.py`).

`read_tensors` checks in this order: the size of the file, the size of its header, the format name, the hash, and only then the
tensors themselves, so a wrong file cannot fill the memory. `fill_module` copies tensors into a module, all or none; `build_module` first
makes the module with the configuration that the same file holds.

Read next: `perception/training/detector_files.py` and `perception/wire/encoder_file.py`, the two kinds that users meet.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import InvalidInput
from .files import check_input_file, write_atomically
from .foreign_text import shown
from .safetensors_bytes import FILE_DIGEST_KEY, METADATA_KEY, file_digest_of, safetensors_pieces
from .strict_json import strict_json

EARLIER_DIGEST_KEY = "content_sha256"
"""Name of the metadata entry with the hash of the tensors alone, in files of earlier formats."""
FORMAT_KEY = "format"
MAX_HEADER_BYTES = 32 << 20  # proposals of 158,000 Waymo frames have 10 MB; safetensors itself stops at 100 MB
MAX_FILE_BYTES = 16 << 30
SPARE_NUMBERS = 1 << 26
"""Numbers that a module may make besides those in its file: anchors and the like, 0.27e9 bytes at most."""
LISTED_NAMES = 10
"""Names of weights that a message lists; of more it says how many there are."""

M = TypeVar("M", bound=nn.Module)


class CorruptFile(InvalidInput):
    """A file is damaged: it does not hold what was written."""


@dataclass(frozen=True, kw_only=True)
class TensorFileKind:
    """One kind of tensor file: how it is recognized, and what error messages say about it."""

    name: str
    """What such a file is, for messages, without an article: "vehicle encoder"."""

    format: str
    """Name and version of the format, as the metadata of every new file hold it: "upcycle3d encoder 3"."""

    advice: str
    """What a person can do when a file is missing, damaged or of another kind; ends a message, so without a full stop."""

    max_bytes: int = MAX_FILE_BYTES
    """Largest file that is read (bytes)."""

    earlier: tuple[str | None, ...] = ()
    """Earlier formats that are read too; None stands for files without a format name. Their hash covers the tensors only."""

    earlier_hashed: bool = True
    """Whether a file of an earlier format without a recorded hash is refused. Encoder files of version 0.1 have none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorFile:
    """What a tensor file holds, after its hash was checked."""

    path: Path
    """Where it was read, for messages."""

    tensors: Mapping[str, Tensor]
    """Tensors on the CPU by name."""

    meta: Mapping[str, str]
    """Metadata of the file, format name and hash included."""

    def described(self, key: str) -> Any:
        """Read one entry of the metadata as JSON.

        Args:
            key: Name of the entry, e.g. "config".

        Returns:
            The plain value.

        Raises:
            CorruptFile: The entry is missing or is not JSON.
        """
        if key not in self.meta:
            raise CorruptFile(f"{self.path} has no {key!r} in its metadata, so it is incomplete; copy it again from its source")
        return strict_json(
            self.meta[key].encode("utf-8", "surrogatepass"), f"the {key!r} in the metadata of {self.path}", CorruptFile
        )

    def named(self, *names: str) -> tuple[Tensor, ...]:
        """Take some tensors out of the file.

        Args:
            *names: Their names.

        Returns:
            The tensors in the order of `names`.

        Raises:
            CorruptFile: A tensor is missing; the message lists all that are.
        """
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise CorruptFile(f"{self.path} is incomplete: it has no tensor {', '.join(missing)}; copy it again from its source")
        return tuple(self.tensors[name] for name in names)


# ------------------------------------------------------------------------------------------------------------------- reading


def read_tensors(path: str | Path, kind: TensorFileKind | None = None) -> TensorFile:
    """Read and check a tensor file.

    The recorded hash is compared wherever the file has one. Files of other programs have none and are accepted without a `kind`.
    A file of a `kind` has one, with the exceptions that `TensorFileKind` names.

    Args:
        path: The safetensors file.
        kind: What the file must be. None accepts every safetensors file.

    Returns:
        The tensors and the metadata.

    Raises:
        InvalidInput: The file is missing, cannot be opened, is too large, or is of another kind.
        CorruptFile: The file is not readable as safetensors, or does not have the recorded hash.

    Example:
        ```python
        file = read_tensors("runs/source/detector.safetensors")
        print(len(file.tensors), file.meta["format"])
        ```
    """
    path = Path(path)
    advice = kind.advice if kind is not None else "copy it again from its source"
    check_input_file(path, "file" if kind is None else kind.name)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            limit = kind.max_bytes if kind is not None else MAX_FILE_BYTES
            if size > limit:
                raise InvalidInput(f"{path} has {size} bytes, and at most {limit} are read; {advice}")
            if size > (memory := _memory_bytes()):
                raise InvalidInput(f"{path} has {size} bytes, more than the memory of this machine ({memory}); {advice}")
            start = stream.read(8)
            header = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= header <= min(MAX_HEADER_BYTES, size - 8):
                raise CorruptFile(f"{path} is not a readable safetensors file ({size} bytes, no valid header); {advice}")
            meta = _metadata(stream.read(header), size, path, advice)
            if kind is not None and meta.get(FORMAT_KEY) not in (kind.format, *kind.earlier):
                found = f"'{shown(meta[FORMAT_KEY])}'" if FORMAT_KEY in meta else "no format name"
                raise InvalidInput(f"{path} is not a {kind.name}: expected format {kind.format!r}, found {found}; {advice}")
            stream.seek(0)
            data = stream.read()
            _check_file_digest(data, 8 + header, meta, path, kind, advice)
            tensors = _tensors(data, path, advice)
    except MemoryError as error:
        raise InvalidInput(
            f"{path} has {size} bytes, which do not fit into the free memory; end other programs, or {advice}"
        ) from error
    except FileNotFoundError as error:
        what = f"{kind.name} at" if kind is not None else "file"
        raise InvalidInput(f"there is no {what} {path}; {kind.advice if kind is not None else 'is the path right?'}") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}; {advice}") from error
    recorded = meta.get(EARLIER_DIGEST_KEY)
    if recorded is not None and recorded != content_digest(tensors):
        raise CorruptFile(f"the tensors of {path} do not have the recorded SHA-256; {advice}")
    return TensorFile(path=path, tensors=tensors, meta=meta)


def _check_file_digest(
    data: bytes, start: int, meta: Mapping[str, str], path: Path, kind: TensorFileKind | None, advice: str
) -> None:
    recorded = meta.get(FILE_DIGEST_KEY)
    if recorded is not None:
        if file_digest_of(data[:start], iter([memoryview(data)[start:]]), recorded) != recorded:
            raise CorruptFile(f"{path} does not have the SHA-256 that it records: it was changed or damaged; {advice}")
        return
    needed = kind is not None and (
        meta.get(FORMAT_KEY) == kind.format or (kind.earlier_hashed and EARLIER_DIGEST_KEY not in meta)
    )
    if kind is not None and needed:
        raise CorruptFile(f"{path} has no recorded SHA-256, which every {kind.name} has: it was changed or damaged; {advice}")


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def decode_tensors(data: bytes, path: str | Path) -> dict[str, Tensor]:
    """Read the tensors out of the bytes of a safetensors file whose size and hash were checked before.

    Args:
        data: The whole file.
        path: Where the bytes are from, for messages.

    Returns:
        Tensors on the CPU by name.

    Raises:
        CorruptFile: The bytes are not a safetensors file.
    """
    return _tensors(data, Path(path), "copy it again from its source")


def _tensors(data: bytes, path: Path, advice: str) -> dict[str, Tensor]:
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptFile(f"{path} is not a readable safetensors file ({error}); {advice}") from error


def _metadata(header: bytes, size: int, path: Path, advice: str) -> dict[str, str]:
    """The metadata in a header, after comparing the size of the file with what the header describes."""
    try:
        described = json.loads(header)
        meta = described.pop(METADATA_KEY, {})
        good = all(isinstance(value, str) for value in meta.values())
        end = max((int(entry["data_offsets"][1]) for entry in described.values()), default=0)
    except (ValueError, AttributeError, RecursionError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise CorruptFile(f"{path} is not a readable safetensors file ({shown(error)}); {advice}") from error
    if not good:
        raise CorruptFile(f"{path} is not a readable safetensors file (its metadata are not strings); {advice}")
    if size != 8 + len(header) + end:
        raise CorruptFile(
            f"{path} is not a readable safetensors file: its header describes {8 + len(header) + end} bytes, and it has {size}; {advice}"
        )
    return dict(meta)


def load_module(
    path: str | Path,
    kind: TensorFileKind,
    configured: Callable[[TensorFile], Callable[[], M]],
    *,
    in_run: str | None = None,
) -> tuple[M, TensorFile]:
    """Load a module from a file that holds its configuration and its weights.

    Args:
        path: The file, or a run folder that holds it.
        kind: What the file must be.
        configured: Reads the configuration in the file, and gives what builds the module with fresh weights.
        in_run: Name of the file in a run folder; None where there is no such folder.

    Returns:
        The module in evaluation mode, on the CPU, and the file.

    Raises:
        InvalidInput: The file is missing or of another kind, its configuration cannot be used, or its weights do not fit it or hold
            NaN.
        CorruptFile: The file is damaged.
    """
    if not isinstance(path, str | Path):
        article = "an" if kind.name[0] in "aeiou" else "a"
        raise InvalidInput(
            f"{article} {kind.name} is loaded from a file or a run folder, found {type(path).__name__}; give its path"
        )
    path = Path(path)
    if in_run is not None and path.is_dir():
        if not (path / in_run).exists() and (path / "config.json").exists():
            raise InvalidInput(
                f"the run in {path} has not finished: it has no {in_run} yet. Continue it with the command that began it and --resume"
            )
        path = path / in_run
    file = read_tensors(path, kind)
    try:
        build = configured(file)
    except CorruptFile:
        raise
    except (InvalidInput, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        text = error if isinstance(error, InvalidInput) else f"{type(error).__name__}: {shown(error)}"
        raise InvalidInput(f"the configuration in {file.path} cannot be used: {text}; {kind.advice}") from error
    return build_module(build, file.tensors, file.path).eval(), file


def listed(names: Sequence[str], most: int = LISTED_NAMES) -> list[str]:
    """Shorten a list of names for a message.

    Args:
        names: Names, or whole lines.
        most: Number of names to keep.

    Returns:
        The first names, and how many more there are.
    """
    safe = [shown(name) for name in names[:most]]
    return safe if len(names) <= most else [*safe, f"and {len(names) - most} more"]


def fill_module(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy tensors into the parameters and buffers of a module; names and shapes must agree completely.

    Args:
        module: The module to fill, in place.
        tensors: One tensor for every name of the module's `state_dict`, on any device. Floats may be of another precision.
        source: Where the tensors are from, for messages.

    Raises:
        InvalidInput: Names, shapes or types differ. The message counts them and lists the first; the module is then untouched.
    """
    own = module.state_dict()
    missing = [f"missing {name} {tuple(t.shape)}" for name, t in own.items() if name not in tensors]
    unexpected = [f"unexpected {name} {tuple(t.shape)}" for name, t in tensors.items() if name not in own]
    unequal = []
    for name, target in own.items():
        if name not in tensors:
            continue
        found = tensors[name]
        if found.shape != target.shape:
            unequal.append(f"shape of {name}: the module has {tuple(target.shape)}, the file {tuple(found.shape)}")
        elif found.is_floating_point() != target.is_floating_point():
            unequal.append(f"type of {name}: the module has {target.dtype}, the file {found.dtype}")
    if faults := len(missing) + len(unexpected) + len(unequal):
        lines = "\n  ".join(line for part in (missing, unexpected, unequal) for line in listed(part))
        raise InvalidInput(
            f"the weights of {source} do not fit {type(module).__name__} ({faults} of {len(own)} names):\n  {lines}\n"
            "build the module with the configuration that the weights were trained with"
        )
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(tensors[name])


def build_module(build: Callable[[], M], tensors: Mapping[str, Tensor], source: str | Path) -> M:
    """Build a module as a file's configuration says, and fill it with the file's tensors.

    A configuration of a few bytes can describe a network that fills any memory, so building stops as soon as the module has made
    more numbers than the file holds (and `SPARE_NUMBERS` for what is not stored). The weights are compared after that.

    Args:
        build: What makes the module with its fresh weights: `config.build`.
        tensors: The tensors of the file.
        source: The file, for messages.

    Returns:
        The filled module, in training mode.

    Raises:
        InvalidInput: The configuration cannot be built, the tensors do not fit it, or they hold NaN or inf.
    """
    with built_within(tensors, source):
        module = build()
    fill_module(module, tensors, source)
    bad = not_finite(module.state_dict())
    if bad:
        raise InvalidInput(
            f"the weights of {source} hold NaN or inf in {', '.join(listed(bad, 3))}; "
            "its training went wrong or the file was changed: use another file"
        )
    return module


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Find the tensors that hold NaN or infinite values.

    Args:
        tensors: Tensors by name; whole numbers are always finite.

    Returns:
        Their names.
    """
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]


@contextmanager
def built_within(tensors: Mapping[str, Tensor], source: str | Path) -> Iterator[None]:
    """Stop what is built inside the block once it has made more numbers than a file holds.

    Args:
        tensors: The tensors of the file.
        source: The file, for messages.

    Yields:
        Nothing.

    Raises:
        InvalidInput: Building made more, or raised something.
    """
    held = sum(tensor.numel() for tensor in tensors.values())
    try:
        with _NumberLimit(held + SPARE_NUMBERS):
            yield
    except InvalidInput as error:
        raise InvalidInput(f"the configuration in {source} cannot be used: {error}") from error
    except Exception as error:  # a configuration from elsewhere can make a constructor raise anything
        raise InvalidInput(f"the configuration in {source} cannot be used: {type(error).__name__}: {shown(error)}") from error


class _NumberLimit(TorchFunctionMode):
    """Refuses to make tensors once they have more numbers together than allowed, before torch takes the memory."""

    _MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
    _JOINERS = (torch.stack, torch.cat)

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.made = limit, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._MAKERS:
            size = kwargs.get("size", args[0] if args and isinstance(args[0], Sequence) else args)
            self.made += math.prod(size)
        elif func in self._JOINERS:
            self.made += sum(tensor.numel() for tensor in (args[0] if args else kwargs["tensors"]))
        if self.made > self.limit:
            raise InvalidInput(f"it describes a network of more than {self.limit} numbers, far more than the file holds")
        return func(*args, **kwargs)


# ------------------------------------------------------------------------------------------------------------------- writing


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, str] | None = None,
    kind: TensorFileKind | None = None,
) -> None:
    """Write a tensor file with its hash; a reader sees the old file or the whole new one. Equal content gives equal bytes.

    Args:
        path: The file to write or to replace; its folder is made where needed.
        tensors: Tensors by name, on any device. Tensors that share memory (tied weights) are written twice.
        meta: Further strings of metadata.
        kind: What the file is; its format name goes into the metadata.

    Raises:
        InvalidInput: `meta` uses a name that this function writes itself.
        OSError: The file cannot be written.
    """
    own = {FILE_DIGEST_KEY: ""} if kind is None else {FILE_DIGEST_KEY: "", FORMAT_KEY: kind.format}
    taken = sorted({EARLIER_DIGEST_KEY, *own} & set(meta or {}))
    if taken:
        raise InvalidInput(f"the metadata name {taken[0]!r} is written by write_tensors itself; choose another")
    write_atomically(Path(path), safetensors_pieces(tensors, {**own, **(meta or {})}))


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Write tensors as the bytes of a safetensors file without metadata, for a caller that records their hash elsewhere.

    Args:
        tensors: Tensors by name, on any device.

    Returns:
        The whole file.
    """
    return b"".join(safetensors_pieces(tensors))


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, types, shapes and values of tensors, in the order of the names.

    Args:
        tensors: Tensors by name, on any device.

    Returns:
        SHA-256 in hexadecimal. It does not depend on the file that holds the tensors.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

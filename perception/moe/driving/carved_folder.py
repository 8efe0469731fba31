"""A carved detector as a folder: an ordinary detector for each context, and the gate that chooses among them.

| file | holds |
|---|---|
| `contexts/NAME/detector.safetensors` | the slices of one context: every command reads it as a detector |
| `contexts/NAME/encoder.safetensors` | the vehicle half, the same for all contexts and for the dense detector |
| `gate.safetensors` | the gate, what the folder is, and the hash of each detector file, so files of two carvings are not mixed up |

Detectors of contexts differ in the tensors of the carved layers alone; everything else is equal bit by bit, and is in memory once.
Read next: `context_store.py`, which loads what differs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ....core.config_json import config_stored_in, config_to_json
from ....core.errors import InvalidInput, require
from ....core.mapped_tensors import MappedTensors, map_tensors
from ....core.new_folder import new_folder
from ....core.rig import RigSpec
from ....core.safetensors_bytes import FILE_DIGEST_KEY
from ....core.tensor_file import TensorFileKind, read_tensors, write_tensors
from ...models.decoders.channels import channel_sites
from ...models.detector import Detector
from ...models.narrow import NarrowDetectorConfig
from ...training.detector_files import DETECTOR_FILE, DETECTOR_KIND, load_detector, save_run_detector
from ..carving.units import CarvingMethod
from .channel_carving import ChannelCarving, narrow_detector
from .context_gate import ContextGate, Hysteresis
from .scan_descriptor import ScanDescriptorConfig

GATE_FILE = "gate.safetensors"
CONTEXTS = "contexts"
_GATE_KIND = TensorFileKind(
    name="gate of a carved detector",
    format="upcycle3d context gate 1",
    advice="give the folder that `upcycle3d moe carve` wrote, or carve the detector again",
)
_TENSORS = ("center", "spread", "weight", "bias")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class CarvedDetectorDescription:
    """What a carved detector is. Field names are stored in its file. `print(description)` shows it."""

    contexts: tuple[str, ...]
    """Name of each context."""
    descriptor: ScanDescriptorConfig
    """How the gate describes a scan."""
    hysteresis: Hysteresis
    """How slowly decisions change on a drive."""
    ratio: float
    """Share of the units that a context keeps."""
    method: CarvingMethod
    """How the units were chosen."""
    detectors: tuple[str, ...]
    """Hash of the detector file of each context."""
    note: str = ""
    """Free text: what it was carved out of, how it was trained and evaluated."""

    def __post_init__(self) -> None:
        require_context_names(self.contexts)
        require(len(self.detectors) == len(self.contexts), "each context needs the hash of its detector")

    def __str__(self) -> str:
        return f"{len(self.contexts)} contexts ({', '.join(self.contexts)}), {self.method}, ratio {self.ratio:g}"


@dataclass(frozen=True, kw_only=True, eq=False)
class CarvedDetector:
    """A carved detector that was opened and checked."""

    description: CarvedDetectorDescription
    """What it is."""
    gate: ContextGate
    """Finds the context of a scan."""
    detector: Detector
    """The detector of the first context, whose tensors `ContextStore` replaces."""
    files: tuple[MappedTensors, ...]
    """The detector file of each context, mapped."""
    changing: tuple[str, ...]
    """Names of the tensors that differ between contexts, in the order of the state dict."""
    digest: str
    """Hash of the gate's file, which holds the hashes of all others: it names this model."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What the values of a point are that this detector and its gate read, in order."""
        features = self.detector.point_features
        more = ("intensity",) if self.gate.descriptor.intensities and "intensity" not in features else ()
        return ("x", "y", "z", *features, *more)

    @property
    def rig(self) -> RigSpec:
        """The rig of the training, which brings scans of the sensor into the frame of the network."""
        trained = self.detector.trained_on
        return RigSpec() if trained is None else trained.rig

    @property
    def context_bytes(self) -> int:
        """Bytes of the tensors of one context. All contexts keep equally many units."""
        return sum(self.files[0].span(name).size for name in self.changing)

    @property
    def common_bytes(self) -> int:
        """Bytes of the tensors that all contexts share."""
        return sum(t.nbytes for name, t in self.detector.state_dict().items() if name not in self.changing)

    def close(self) -> None:
        """Unmap the files."""
        for file in self.files:
            file.close()


def require_context_names(names: tuple[str, ...]) -> None:
    """Refuse names of contexts that cannot be names of folders.

    Args:
        names: The names.

    Raises:
        InvalidInput: A name is missing, occurs twice, or has other letters.
    """
    require(bool(names) and len(set(names)) == len(names), f"contexts need names of their own, found {names[:9]}")
    odd = [name for name in names if not _NAME.fullmatch(name)]
    require(
        not odd, f"a context is named by up to 64 letters, digits, dots, - and _, because it becomes a folder; found {odd[:3]!r}"
    )


def write_carved_detector(
    folder: str | Path,
    detector: Detector,
    carving: ChannelCarving,
    gate: ContextGate,
    *,
    hysteresis: Hysteresis,
    note: str = "",
) -> CarvedDetectorDescription:
    """Write a carved detector. The folder appears complete or not at all.

    Args:
        folder: The folder; it must not exist, or be empty.
        detector: The dense detector, or the trained form of `masked_detector`.
        carving: Which units serve which context.
        gate: Finds the context of a scan.
        hysteresis: How slowly decisions change on a drive.
        note: Free text.

    Returns:
        What was written.

    Raises:
        InvalidInput: The folder holds something, gate and carving have other contexts, or nothing is left out.
    """
    require(gate.contexts == carving.domains, f"the gate knows {gate.contexts}, and the carving {carving.domains}")
    require_context_names(carving.domains)
    digests = []
    with new_folder(Path(folder)) as work:
        for number, name in enumerate(carving.domains):
            narrow = narrow_detector(detector, carving, number)
            if not isinstance(narrow.config, NarrowDetectorConfig):
                raise InvalidInput(f"a ratio of {carving.ratio:g} leaves nothing out of this detector; take a smaller one")
            place = work / CONTEXTS / name
            place.mkdir(parents=True)
            save_run_detector(place, narrow)
            digests.append(read_tensors(place / DETECTOR_FILE, DETECTOR_KIND).meta[FILE_DIGEST_KEY])
        description = CarvedDetectorDescription(
            contexts=carving.domains,
            descriptor=gate.descriptor,
            hysteresis=hysteresis,
            ratio=carving.ratio,
            method=carving.method,
            detectors=tuple(digests),
            note=note,
        )
        tensors = {name: getattr(gate, name) for name in _TENSORS}
        write_tensors(work / GATE_FILE, tensors, {"description": json.dumps(config_to_json(description))}, _GATE_KIND)
    return description


def is_carved_detector(folder: str | Path) -> bool:
    """Say whether a folder looks like a carved detector.

    Args:
        folder: The folder.

    Returns:
        Whether it holds a gate.
    """
    return (Path(folder) / GATE_FILE).is_file()


def open_carved_detector(folder: str | Path) -> CarvedDetector:
    """Open and check a carved detector. The first context is read into memory, and the files of all contexts are mapped.

    Args:
        folder: What `upcycle3d moe carve` wrote.

    Returns:
        The detector. Close it when it is not used any more.

    Raises:
        InvalidInput: A file is missing, damaged or of another kind, or the files are not from one carving.
    """
    folder = Path(folder)
    file = read_tensors(folder / GATE_FILE, _GATE_KIND)
    description = config_stored_in(file.path, CarvedDetectorDescription, file.described("description"), _GATE_KIND.advice)
    center, spread, weight, bias = file.named(*_TENSORS)
    gate = ContextGate(
        contexts=description.contexts, descriptor=description.descriptor, center=center, spread=spread, weight=weight, bias=bias
    )
    places = [folder / CONTEXTS / name for name in description.contexts]
    detector = load_detector(places[0])
    files: list[MappedTensors] = []
    try:
        for place, digest in zip(places, description.detectors):
            files.append(map_tensors(place / DETECTOR_FILE, DETECTOR_KIND))
            if files[-1].meta[FILE_DIGEST_KEY] != digest:
                raise InvalidInput(f"{files[-1].path} is not the file that {file.path} names; {_GATE_KIND.advice}")
        changing = _changing(detector, files)
    except BaseException:
        for one in files:
            one.close()
        raise
    return CarvedDetector(
        description=description,
        gate=gate,
        detector=detector,
        files=tuple(files),
        changing=changing,
        digest=file.meta[FILE_DIGEST_KEY],
    )


def _changing(detector: Detector, files: list[MappedTensors]) -> tuple[str, ...]:
    """Names of the tensors of the carved layers, after checking that all others are equal bit by bit."""
    config = detector.config
    if not isinstance(config, NarrowDetectorConfig):
        raise InvalidInput(f"{files[0].path} holds a {detector.label}, from which nothing was left out; {_GATE_KIND.advice}")
    smaller = {one.site for one in config.kept}
    carved = {f"decoder.{name}" for site in channel_sites(detector.decoder) if site.name in smaller for name in site.tensors}
    own = detector.state_dict()
    for file in files:
        for name, value in own.items():
            span = file.span(name)
            good = (span.shape, span.dtype) == (tuple(value.shape), value.dtype)
            if not good or (name not in carved and not torch.equal(file.copy(name), value)):
                raise InvalidInput(f"{file.path} and {files[0].path} differ in {name!r}, which no context has of its own")
    return tuple(name for name in own if name in carved)

"""One smashed scene as bytes: what is quantised, how it is packed, and how bytes from a stranger are read.

    SmashedScene ─ quantise features, delta-code coordinates ─ safetensors ─ zstd (level 1, content checksum) ─ bytes

Coordinates are exact: the sorted linear index of each cell, as gaps to the cell before, in byte planes of the smallest width
that fits. Features are lossy, by one of two codecs:

``fp16``  rounds to half precision: relative error at most 2^-11, absolute at most 2^-25 below 2^-14.
``int8``  maps each channel of the scene from [min, max] to 0..255: absolute error at most (max - min) / 510 of that channel,
          plus float32 rounding. Features behind a ReLU have min 0 wherever the channel is silent once, and zeros stay zeros.

Features lie channel by channel, (C, M): neighbours in a channel resemble each other, which saves zstd about a tenth (measured:
8 % fp16, 11 % int8).

Reading trusts nothing: sizes are capped before memory is taken, the checksum must be there and hold, and the header must be
what the reader expects. Anything else is a ``CorruptScene`` or a ``ForeignScene``.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy
from torch import Tensor

from ..features import SMASHED_SCHEMA_VERSION, SmashedScene, SplitSpec, VoxelGrid
from ..structures import InvalidInput, UpcycleError

CODECS = ("fp16", "int8")
FEATURE_LIMIT = 65504.0  # the largest half-precision number

_HEADER_CAP = 1 << 16
_WINDOW_CAP = 1 << 23  # RFC 8878: what every decoder should support; a frame's window is memory too
_CELL_CAP = 1 << 31  # linear indices and their sums stay far inside int64
_METADATA_KEY = "smashed_scene"
_HEADER_KEYS = {"schema_version", "codec", "split", "encoder_fingerprint", "scene_id"}
FINGERPRINT_PATTERN = re.compile(r"[0-9a-f]{64}")
_SCENE_ID_PATTERN = re.compile(r"[0-9a-f]{32}")


class CorruptScene(UpcycleError):
    """Bytes that are damaged, or never were a smashed scene."""


class ForeignScene(UpcycleError):
    """An intact scene or shard of another encoder, cut or schema version."""


class FeatureOverflow(UpcycleError):
    """A feature that no codec can hold."""


# ---------------------------------------------------------------------------------------------------------------- JSON


def canonical_json(value: Any) -> bytes:
    """The one spelling of ``value``: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def strict_json(data: bytes, what: str) -> Any:
    """JSON of a stranger: no duplicate keys, no NaN; raises ``CorruptScene`` that names ``what``."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            raise ValueError("a key stands twice")
        return record

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # ValueError covers broken UTF-8, broken JSON and oversized integers
        raise CorruptScene(f"{what} is not valid JSON: {error}") from error


def spec_to_json(spec: SplitSpec) -> dict[str, Any]:
    """The cut as plain values."""
    return {
        "layer": spec.layer,
        "channels": spec.channels,
        "stride": list(spec.stride),
        "shape": list(spec.shape),
        "grid": {"range": [float(v) for v in spec.grid.range], "voxel_size": [float(v) for v in spec.grid.voxel_size]},
    }


def spec_from_json(record: Any, what: str) -> SplitSpec:
    """Inverse of ``spec_to_json`` for a record from outside; raises ``CorruptScene`` or ``InvalidInput`` that names ``what``."""

    def numbers(value: Any, count: int, kinds: tuple[type, ...], low: float, high: float) -> tuple[Any, ...]:
        fits = isinstance(value, list) and len(value) == count and all(type(v) in kinds and low <= v <= high for v in value)
        if not fits:
            raise CorruptScene(f"{what}: expected {count} numbers in {low:g}..{high:g}, found {str(value)[:80]}")
        return tuple(value)

    if not isinstance(record, dict) or record.keys() != {"layer", "channels", "stride", "shape", "grid"}:
        raise CorruptScene(f"{what}: expected layer, channels, stride, shape and grid, found {str(record)[:80]}")
    grid, layer = record["grid"], record["layer"]
    if not isinstance(grid, dict) or grid.keys() != {"range", "voxel_size"}:
        raise CorruptScene(f"{what}: expected a grid of range and voxel_size, found {str(grid)[:80]}")
    if not isinstance(layer, str) or not re.fullmatch(r"[\w.]{1,128}", layer):
        raise CorruptScene(f"{what}: expected the name of a layer, found {str(layer)[:80]}")
    (channels,) = numbers([record["channels"]], 1, (int,), 1, 1 << 16)
    stride = numbers(record["stride"], 3, (int,), 1, 1 << 16)
    shape = numbers(record["shape"], 3, (int,), 1, 1 << 20)
    extent = numbers(grid["range"], 6, (int, float), -1e6, 1e6)
    voxel_size = numbers(grid["voxel_size"], 3, (int, float), 1e-6, 1e6)
    voxel_grid = VoxelGrid(range=extent, voxel_size=voxel_size)  # type: ignore[arg-type]
    return SplitSpec(layer=layer, channels=channels, stride=stride, shape=shape, grid=voxel_grid)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- coordinates


def _cells(spec: SplitSpec) -> int:
    cells = math.prod(spec.shape)
    if not 0 < cells < _CELL_CAP:
        raise InvalidInput(f"a grid of {spec.shape} has {cells} cells; smashed scenes hold 1 to {_CELL_CAP - 1}")
    return cells


def _pack_coords(coords: NDArray[np.int32], spec: SplitSpec) -> NDArray[np.uint8]:
    """(M, 3) ascending z, y, x -> (width, M) bytes: free cells before each cell, least significant plane first."""
    _, height, length = spec.shape
    wide = coords.astype(np.int64)
    index = (wide[:, 0] * height + wide[:, 1]) * length + wide[:, 2]
    gap = np.diff(index, prepend=-1) - 1
    width = max(1, (int(gap.max(initial=0)).bit_length() + 7) // 8)
    return np.ascontiguousarray(gap.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].T)


def _unpack_coords(planes: NDArray[np.uint8], spec: SplitSpec) -> NDArray[np.int32]:
    """Inverse of ``_pack_coords``; ascending and unique by construction. Raises ``CorruptScene`` outside the grid."""
    cells = _cells(spec)
    _, height, length = spec.shape
    width, m = planes.shape
    wide = np.zeros((m, 8), np.uint8)
    wide[:, :width] = planes.T
    gap = wide.view("<i8")[:, 0]
    if m and int(gap.max()) >= cells:
        raise CorruptScene(f"coordinates leave the grid {spec.shape}: a gap of {int(gap.max())} cells; the data is damaged")
    index = np.cumsum(gap + 1) - 1
    if m and int(index[-1]) >= cells:
        raise CorruptScene(f"coordinates leave the grid {spec.shape}: cell {int(index[-1])} of {cells}; the data is damaged")
    row, x = np.divmod(index, length)
    z, y = np.divmod(row, height)
    return np.stack([z, y, x], 1).astype(np.int32)


# ------------------------------------------------------------------------------------------------------------ features


def _check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise InvalidInput(f"unknown codec {codec!r}; choose one of {CODECS}")


def _quantise(features: Tensor, codec: str) -> dict[str, Tensor]:
    """(M, C) float -> what is stored. Raises ``FeatureOverflow`` beyond half precision's range, in both codecs."""
    _check_codec(codec)
    features = features.detach().float()
    m, channels = features.shape
    if m:
        reach = features.abs().amax(0)
        beyond = ~(reach <= FEATURE_LIMIT)  # true for NaN as well
        if beyond.any():
            channel = int(beyond.nonzero()[0])
            raise FeatureOverflow(
                f"channel {channel} reaches {reach[channel].item():g}, beyond the {FEATURE_LIMIT:g} that codec {codec!r} can hold; "
                "the encoder's weights or its input are broken"
            )
    if codec == "fp16":
        return {"features": features.half()}
    low = features.amin(0) if m else features.new_zeros(channels)
    scale = (features.amax(0) - low) / 255 if m else features.new_zeros(channels)
    steps = ((features - low) / torch.where(scale > 0, scale, 1)).round().clamp(0, 255).to(torch.uint8)
    return {"features": steps, "feature_low": low, "feature_scale": scale}


def _dequantise(stored: dict[str, Tensor]) -> Tensor:
    """(M, C) float32 from what ``_quantise`` gave."""
    values = stored["features"].float()
    return values * stored["feature_scale"] + stored["feature_low"] if "feature_low" in stored else values


@torch.no_grad()
def round_trip(features: Tensor, codec: str) -> Tensor:
    """What a reader of the stored scene would see: the quantisation alone, without bytes, without gradient.

    features: (M, C) of ONE scene (int8's ranges are per scene and channel), any device, rows in any order. Returns float32,
    equal bit for bit to encoding and decoding, so that labelled raw scenes and stored scenes meet the decoder alike.
    Raises ``FeatureOverflow`` as ``encode_scene`` does.
    """
    return _dequantise(_quantise(features, codec))


# --------------------------------------------------------------------------------------------------------------- bytes


def _layout(codec: str, width: int, m: int, channels: int) -> dict[str, tuple[str, list[int]]]:
    """safetensors dtype and shape of every tensor in a scene of ``m`` voxels."""
    layout = {"coord_gaps": ("U8", [width, m]), "features": ("F16" if codec == "fp16" else "U8", [channels, m])}
    if codec == "int8":
        layout |= {"feature_low": ("F32", [channels]), "feature_scale": ("F32", [channels])}
    return layout


def _max_raw_bytes(spec: SplitSpec) -> int:
    return 8 + _HEADER_CAP + _cells(spec) * (4 + 2 * spec.channels) + 8 * spec.channels


def max_encoded_bytes(spec: SplitSpec) -> int:
    """No encoded scene of ``spec`` is longer: every cell occupied, and zstd's bound for data that does not compress."""
    raw = _max_raw_bytes(spec)
    return raw + raw // 256 + 1024


def encode_scene(scene: SmashedScene) -> bytes:
    """``scene`` as one zstd-compressed safetensors blob, quantised by ``scene.codec``. Equal scenes give equal bytes.

    Raises ``FeatureOverflow`` for a feature beyond half precision, ``InvalidInput`` for an unknown codec, or an identifier that
    is not random hexadecimal (a name, a time or a serial number would leave the vehicle with it).
    """
    _cells(scene.spec)
    stored = _quantise(scene.features, scene.codec)
    if not _SCENE_ID_PATTERN.fullmatch(scene.scene_id):
        raise InvalidInput(
            f"scene_id must be 32 random hexadecimal digits (secrets.token_hex(16)), found {scene.scene_id[:80]!r}"
        )
    if not FINGERPRINT_PATTERN.fullmatch(scene.encoder_fingerprint):
        raise InvalidInput(f"encoder_fingerprint must be 64 hexadecimal digits, found {scene.encoder_fingerprint[:80]!r}")
    header = {
        "schema_version": scene.schema_version,
        "codec": scene.codec,
        "split": spec_to_json(scene.spec),
        "encoder_fingerprint": scene.encoder_fingerprint,
        "scene_id": scene.scene_id,
    }
    stored["features"] = stored["features"].T
    arrays = {name: tensor.cpu().contiguous().numpy() for name, tensor in stored.items()}
    arrays["coord_gaps"] = _pack_coords(scene.coords.cpu().numpy(), scene.spec)
    raw = safetensors_numpy.save(arrays, metadata={_METADATA_KEY: canonical_json(header).decode()})
    return zstandard.ZstdCompressor(level=1, write_checksum=True, write_content_size=True).compress(raw)


def _decompress(data: bytes, spec: SplitSpec) -> bytes:
    """The frame's content, after every declared size was held against what ``spec`` allows."""
    if len(data) > max_encoded_bytes(spec):
        raise CorruptScene(f"a scene of {len(data)} bytes is longer than this cut allows ({max_encoded_bytes(spec)}); refused")
    try:
        frame = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError as error:
        raise CorruptScene(f"a scene must be one zstd frame; the header cannot be read: {error}") from error
    # zstandard ignores max_output_size when the frame declares its size, so the declaration itself is checked.
    if not frame.has_checksum or frame.dict_id or not 8 < frame.content_size <= _max_raw_bytes(spec):
        raise CorruptScene(
            f"a scene's zstd frame must carry a checksum and declare 9..{_max_raw_bytes(spec)} bytes; found checksum "
            f"{bool(frame.has_checksum)}, dictionary {frame.dict_id}, {frame.content_size} bytes"
        )
    if frame.window_size > max(_WINDOW_CAP, frame.content_size):
        raise CorruptScene(f"a scene's zstd frame asks for a window of {frame.window_size} bytes; refused")
    try:
        raw = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptScene(f"a scene's zstd frame is damaged: {error}") from error
    if len(raw) != frame.content_size:
        raise CorruptScene(f"a scene's zstd frame declares {frame.content_size} bytes and holds {len(raw)}")
    return raw


def _read_header(raw: bytes) -> tuple[dict[str, Any], dict[str, tuple[str, list[int]]]]:
    """The scene's header, and dtype and shape of each tensor, before any tensor is made."""
    size = int.from_bytes(raw[:8], "little")
    if not 2 <= size <= min(_HEADER_CAP, len(raw) - 8):
        raise CorruptScene(f"a scene's safetensors header declares {size} bytes; at most {_HEADER_CAP} are allowed")
    entries = strict_json(raw[8 : 8 + size], "a scene's safetensors header")
    metadata = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or metadata.keys() != {_METADATA_KEY} or not isinstance(metadata[_METADATA_KEY], str):
        raise CorruptScene("the safetensors file holds no smashed scene: its metadata is missing or another's")
    header = strict_json(metadata[_METADATA_KEY].encode("utf-8", "surrogatepass"), "a scene's header")
    if not isinstance(header, dict) or "schema_version" not in header:
        raise CorruptScene("a scene's header holds no schema version")
    tensors = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            raise CorruptScene(f"a scene's tensor {name!r:.80} has no shape")
        tensors[name] = (str(entry.get("dtype")), entry["shape"])
    return header, tensors


def _check_header(header: dict[str, Any], spec: SplitSpec, fingerprint: str) -> None:
    if header["schema_version"] != SMASHED_SCHEMA_VERSION:
        raise ForeignScene(
            f"the scene has schema version {str(header['schema_version'])[:20]}, this reader knows {SMASHED_SCHEMA_VERSION}; "
            "update the older side"
        )
    if header.keys() != _HEADER_KEYS:
        raise CorruptScene(f"a scene's header must hold {sorted(_HEADER_KEYS)}, found {str(sorted(header))[:200]}")
    if header["codec"] not in CODECS:
        raise CorruptScene(f"a scene's codec must be one of {CODECS}, found {str(header['codec'])[:80]!r}")
    if not isinstance(header["scene_id"], str) or not _SCENE_ID_PATTERN.fullmatch(header["scene_id"]):
        raise CorruptScene("a scene's identifier must be 32 hexadecimal digits")
    if header["encoder_fingerprint"] != fingerprint:
        raise ForeignScene(
            f"the scene was made by encoder {str(header['encoder_fingerprint'])[:64]}, expected {fingerprint}; features of two "
            "encoders do not mix: update the vehicle or train a decoder for its encoder"
        )
    if header["split"] != spec_to_json(spec):
        raise ForeignScene(f"the scene was cut at {str(header['split'])[:300]}, expected {spec_to_json(spec)}")


def decode_scene(data: bytes, *, expected_spec: SplitSpec, expected_fingerprint: str) -> SmashedScene:
    """Inverse of ``encode_scene`` for bytes from outside; memory is bounded by ``expected_spec``'s grid.

    Raises ``CorruptScene`` for damaged bytes, ``ForeignScene`` for an intact scene of another encoder, cut or schema version,
    ``InvalidInput`` for stored NaN. All are ``UpcycleError``.
    """
    raw = _decompress(data, expected_spec)
    header, tensors = _read_header(raw)
    _check_header(header, expected_spec, expected_fingerprint)
    shape = tensors.get("coord_gaps", ("", []))[1]
    cells = _cells(expected_spec)
    if (
        len(shape) != 2
        or type(shape[0]) is not int
        or type(shape[1]) is not int
        or not (1 <= shape[0] <= 4 and 0 <= shape[1] <= cells)
    ):
        raise CorruptScene(f"a scene's coordinates must be (1..4, 0..{cells}) bytes, found {str(shape)[:80]}")
    width, m = shape
    layout = _layout(header["codec"], width, m, expected_spec.channels)
    if tensors != layout:
        raise CorruptScene(f"a scene of {m} voxels must hold {layout}, found {str(tensors)[:300]}")
    try:
        arrays = safetensors_numpy.load(raw)
    except (SafetensorError, ValueError) as error:
        raise CorruptScene(f"a scene's tensors cannot be read: {error}") from error
    coords = _unpack_coords(arrays.pop("coord_gaps"), expected_spec)
    stored = {name: torch.from_numpy(array) for name, array in arrays.items()}
    stored["features"] = stored["features"].T.contiguous()
    return SmashedScene(
        spec=expected_spec,
        coords=torch.from_numpy(coords),
        features=_dequantise(stored),
        codec=header["codec"],
        encoder_fingerprint=header["encoder_fingerprint"],
        scene_id=header["scene_id"],
    )

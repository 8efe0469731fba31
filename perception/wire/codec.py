"""One smashed scene as bytes: what is quantised, how it is packed, and how bytes from a stranger are read.

    SmashedScene ─ quantise features, delta-code coordinates ─ safetensors ─ zstd (level 1, content checksum) ─ bytes

What is stored: the cells at the cut with their features; where the cut has keypoints, their cells of the input grid with their
features; and in the header the schema version, the codec, the cut, the encoder's fingerprint and a random identifier.

Coordinates are exact: the sorted linear index of each cell, as gaps to the cell before, in byte planes of the smallest width
that fits. Keypoints keep the encoder's order, which its ball queries depend on, so their cells are stored as they are: z, y and
x in planes of two bytes. Features are lossy, by one of two codecs; int8's channels of voxels and keypoints have their own ranges:

``fp16``  rounds to half precision: relative error at most 2^-11, absolute at most 2^-25 below 2^-14.
``int8``  maps each channel of the scene from [min, max] to 0..255: absolute error at most (max - min) / 510 of that channel,
          plus float32 rounding. Features behind a ReLU have min 0 wherever the channel is silent once, and zeros stay zeros.

Features lie channel by channel, (C, M): neighbours in a channel resemble each other, which saves zstd about a tenth (measured:
8 % fp16, 11 % int8).

Reading trusts nothing: sizes are capped before memory is taken, the checksum must be there and hold, and the header must be
what the reader expects. Anything else is a ``CorruptScene`` or a ``ForeignScene``.
"""

from __future__ import annotations

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

from ...core.cut import CutSpec
from ...core.errors import InvalidInput, UpcycleError
from ...core.smashed_scene import SMASHED_SCHEMA_VERSION, SmashedScene
from ...core.strict_json import canonical_json, strict_json
from .cut_json import CorruptScene, cut_to_json

CODECS = ("fp16", "int8")
FEATURE_LIMIT = 65504.0  # the largest half-precision number

_HEADER_CAP = 1 << 16
_WINDOW_CAP = 1 << 23  # RFC 8878: what every decoder should support; a frame's window is memory too
_CELL_CAP = 1 << 31  # linear indices and their sums stay far inside int64
_AXIS_CAP = 1 << 16  # a keypoint's cell has two bytes an axis
_METADATA_KEY = "smashed_scene"
_HEADER_KEYS = {"schema_version", "codec", "split", "encoder_fingerprint", "scene_id"}
FINGERPRINT_PATTERN = re.compile(r"[0-9a-f]{64}")
_SCENE_ID_PATTERN = re.compile(r"[0-9a-f]{32}")


class ForeignScene(UpcycleError):
    """An intact scene or shard of another encoder, cut or schema version."""


class FeatureOverflow(UpcycleError):
    """A feature that no codec can hold."""


# --------------------------------------------------------------------------------------------------------- coordinates


def _cells(spec: CutSpec) -> int:
    cells = math.prod(spec.shape)
    if not 0 < cells < _CELL_CAP:
        raise InvalidInput(f"a grid of {spec.shape} has {cells} cells; smashed scenes hold 1 to {_CELL_CAP - 1}")
    return cells


def _keypoint_sizes(spec: CutSpec) -> tuple[int, int]:
    """At most so many keypoints a scene, of so many channels; (0, 0) without."""
    if spec.keypoints is None:
        return (0, 0)
    if max(spec.grid.shape) > _AXIS_CAP:
        raise InvalidInput(
            f"a grid of {spec.grid.shape} voxels (z, y, x) is too large for keypoints, whose cells have two bytes an axis: at most "
            f"{_AXIS_CAP} voxels; use larger voxels or a smaller range"
        )
    return (spec.keypoints.count, spec.keypoints.channels)


def _pack_coords(coords: NDArray[np.int32], spec: CutSpec) -> NDArray[np.uint8]:
    """(M, 3) ascending z, y, x -> (width, M) bytes: free cells before each cell, least significant plane first."""
    _, height, length = spec.shape
    wide = coords.astype(np.int64)
    index = (wide[:, 0] * height + wide[:, 1]) * length + wide[:, 2]
    gap = np.diff(index, prepend=-1) - 1
    width = max(1, (int(gap.max(initial=0)).bit_length() + 7) // 8)
    return np.ascontiguousarray(gap.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].T)


def _unpack_coords(planes: NDArray[np.uint8], spec: CutSpec) -> NDArray[np.int32]:
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


def _quantize(features: Tensor, codec: str, prefix: str = "") -> dict[str, Tensor]:
    """(M, C) float -> what is stored, each name behind ``prefix``: "" or "keypoint_".

    Raises ``FeatureOverflow`` beyond half precision's range, in both codecs.
    """
    _check_codec(codec)
    features = features.detach().float()
    m, channels = features.shape
    if m:
        reach = features.abs().amax(0)
        beyond = ~(reach <= FEATURE_LIMIT)  # true for NaN as well
        if beyond.any():
            channel = int(beyond.nonzero()[0])
            raise FeatureOverflow(
                f"{prefix.replace('_', ' ')}channel {channel} reaches {reach[channel].item():g}, beyond the {FEATURE_LIMIT:g} that "
                f"codec {codec!r} can hold; the encoder's weights or its input are broken"
            )
    if codec == "fp16":
        return {f"{prefix}features": features.half()}
    low = features.amin(0) if m else features.new_zeros(channels)
    scale = (features.amax(0) - low) / 255 if m else features.new_zeros(channels)
    steps = ((features - low) / torch.where(scale > 0, scale, 1)).round().clamp(0, 255).to(torch.uint8)
    return {f"{prefix}features": steps, f"{prefix}feature_low": low, f"{prefix}feature_scale": scale}


def _dequantize(stored: dict[str, Tensor], prefix: str = "") -> Tensor:
    """(M, C) float32 from what ``_quantise`` gave."""
    values = stored[f"{prefix}features"].float()
    if f"{prefix}feature_low" not in stored:
        return values
    return values * stored[f"{prefix}feature_scale"] + stored[f"{prefix}feature_low"]


def _turned(tensor: Tensor) -> Tensor:
    """(M, C) -> (C, M) and back; ranges (C,) stay as they are."""
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor


@torch.no_grad()
def round_trip(features: Tensor, codec: str) -> Tensor:
    """What a reader of the stored scene would see: the quantisation alone, without bytes, without gradient.

    features: (M, C) of the voxels, or of the keypoints, of ONE scene (int8's ranges are per scene and channel), any device, rows
    in any order. Returns float32, equal bit for bit to encoding and decoding, so that labelled raw scenes and stored scenes meet
    the decoder alike. Raises ``FeatureOverflow`` as ``encode_scene`` does.
    """
    return _dequantize(_quantize(features, codec))


# --------------------------------------------------------------------------------------------------------------- bytes


def _feature_layout(codec: str, m: int, channels: int, prefix: str = "") -> dict[str, tuple[str, list[int]]]:
    layout = {f"{prefix}features": ("F16" if codec == "fp16" else "U8", [channels, m])}
    if codec == "int8":
        layout |= {f"{prefix}feature_low": ("F32", [channels]), f"{prefix}feature_scale": ("F32", [channels])}
    return layout


def _layout(spec: CutSpec, codec: str, width: int, m: int, k: int) -> dict[str, tuple[str, list[int]]]:
    """safetensors dtype and shape of every tensor in a scene of ``m`` voxels and ``k`` keypoints."""
    layout = {"coord_gaps": ("U8", [width, m]), **_feature_layout(codec, m, spec.channels)}
    if spec.keypoints is not None:
        layout |= {"keypoint_cells": ("U16", [3, k]), **_feature_layout(codec, k, spec.keypoints.channels, "keypoint_")}
    return layout


def _max_raw_bytes(spec: CutSpec) -> int:
    voxels = _cells(spec) * (4 + 2 * spec.channels) + 8 * spec.channels
    count, channels = _keypoint_sizes(spec)
    return 8 + _HEADER_CAP + voxels + count * (6 + 2 * channels) + 8 * channels


def max_encoded_bytes(spec: CutSpec) -> int:
    """No encoded scene of ``spec`` is longer: every cell and keypoint there, and zstd's bound for data that does not compress."""
    raw = _max_raw_bytes(spec)
    return raw + raw // 256 + 1024


def encode_scene(scene: SmashedScene) -> bytes:
    """``scene`` as one zstd-compressed safetensors blob, quantised by ``scene.codec``. Equal scenes give equal bytes.

    Raises ``FeatureOverflow`` for a feature beyond half precision, ``InvalidInput`` for an unknown codec, a grid too large, or an
    identifier that is not random hexadecimal (a name, a time or a serial number would leave the vehicle with it).
    """
    _cells(scene.spec)
    _keypoint_sizes(scene.spec)
    stored = _quantize(scene.features, scene.codec)
    if scene.spec.keypoints is not None:
        stored |= _quantize(scene.keypoint_features, scene.codec, "keypoint_")
    if not _SCENE_ID_PATTERN.fullmatch(scene.scene_id):
        raise InvalidInput(
            f"scene_id must be 32 random hexadecimal digits (secrets.token_hex(16)), found {scene.scene_id[:80]!r}"
        )
    if not FINGERPRINT_PATTERN.fullmatch(scene.encoder_fingerprint):
        raise InvalidInput(f"encoder_fingerprint must be 64 hexadecimal digits, found {scene.encoder_fingerprint[:80]!r}")
    header = {
        "schema_version": scene.schema_version,
        "codec": scene.codec,
        "split": cut_to_json(scene.spec),
        "encoder_fingerprint": scene.encoder_fingerprint,
        "scene_id": scene.scene_id,
    }
    arrays = {name: _turned(tensor).cpu().numpy() for name, tensor in stored.items()}
    arrays["coord_gaps"] = _pack_coords(scene.coords.cpu().numpy(), scene.spec)
    if scene.spec.keypoints is not None:
        arrays["keypoint_cells"] = np.ascontiguousarray(scene.keypoint_cells.cpu().numpy().astype("<u2").T)
    raw = safetensors_numpy.save(arrays, metadata={_METADATA_KEY: canonical_json(header).decode()})
    return zstandard.ZstdCompressor(level=1, write_checksum=True, write_content_size=True).compress(raw)


def _decompress(data: bytes, spec: CutSpec) -> bytes:
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
    entries = strict_json(raw[8 : 8 + size], "a scene's safetensors header", CorruptScene)
    metadata = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or metadata.keys() != {_METADATA_KEY} or not isinstance(metadata[_METADATA_KEY], str):
        raise CorruptScene("the safetensors file holds no smashed scene: its metadata is missing or another's")
    header = strict_json(metadata[_METADATA_KEY].encode("utf-8", "surrogatepass"), "a scene's header", CorruptScene)
    if not isinstance(header, dict) or "schema_version" not in header:
        raise CorruptScene("a scene's header holds no schema version")
    tensors = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            raise CorruptScene(f"a scene's tensor {name!r:.80} has no shape")
        tensors[name] = (str(entry.get("dtype")), entry["shape"])
    return header, tensors


def _check_header(header: dict[str, Any], spec: CutSpec, fingerprint: str) -> None:
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
    if header["split"] != cut_to_json(spec):
        raise ForeignScene(f"the scene was cut at {str(header['split'])[:400]}, expected {cut_to_json(spec)}")


def _declared(
    tensors: dict[str, tuple[str, list[int]]], name: str, rows: tuple[int, int], columns: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns that the header declares for a tensor, each within its bounds."""
    shape = tensors.get(name, ("", []))[1]
    bounds = (rows, columns)
    if len(shape) != 2 or not all(type(n) is int and low <= n <= high for n, (low, high) in zip(shape, bounds, strict=True)):
        raise CorruptScene(
            f"a scene's {name} must be ({rows[0]}..{rows[1]}, {columns[0]}..{columns[1]}), found {str(shape)[:80]}"
        )
    return (shape[0], shape[1])


def decode_scene(data: bytes, *, expected_spec: CutSpec, expected_fingerprint: str) -> SmashedScene:
    """Inverse of ``encode_scene`` for bytes from outside; memory is bounded by ``expected_spec``'s grid and keypoints.

    Raises ``CorruptScene`` for damaged bytes, ``ForeignScene`` for an intact scene of another encoder, cut or schema version,
    ``InvalidInput`` for stored NaN, or keypoints twice in a cell or outside the grid. All are ``UpcycleError``.
    """
    raw = _decompress(data, expected_spec)
    header, tensors = _read_header(raw)
    _check_header(header, expected_spec, expected_fingerprint)
    width, m = _declared(tensors, "coord_gaps", (1, 4), (0, _cells(expected_spec)))
    count, _ = _keypoint_sizes(expected_spec)
    k = 0 if expected_spec.keypoints is None else _declared(tensors, "keypoint_cells", (3, 3), (0, count))[1]
    layout = _layout(expected_spec, header["codec"], width, m, k)
    if tensors != layout:
        raise CorruptScene(f"a scene of {m} voxels and {k} keypoints must hold {layout}, found {str(tensors)[:300]}")
    try:
        arrays = safetensors_numpy.load(raw)
    except (SafetensorError, ValueError) as error:
        raise CorruptScene(f"a scene's tensors cannot be read: {error}") from error
    coords = torch.from_numpy(_unpack_coords(arrays.pop("coord_gaps"), expected_spec))
    keypoint_cells = arrays.pop("keypoint_cells", np.zeros((3, 0), "<u2")).T.astype(np.int32)
    stored = {name: _turned(torch.from_numpy(array)) for name, array in arrays.items()}
    return SmashedScene(
        spec=expected_spec,
        coords=coords,
        features=_dequantize(stored),
        keypoint_cells=torch.from_numpy(keypoint_cells),
        keypoint_features=torch.zeros(0, 0) if expected_spec.keypoints is None else _dequantize(stored, "keypoint_"),
        codec=header["codec"],
        encoder_fingerprint=header["encoder_fingerprint"],
        scene_id=header["scene_id"],
    )

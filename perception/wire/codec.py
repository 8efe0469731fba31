"""One smashed scene as bytes: how features are quantized and packed, and how untrusted bytes are read.

    SmashedScene ─ quantize features, pack coordinates ─ safetensors ─ zstd (level 1, content checksum) ─ bytes

What is stored: the cells at the cut with their features; where the cut has keypoints, their cells of the input grid with their
features; and in the header the schema version, the codec, the cut, the encoder fingerprint and a random identifier.

Coordinates are exact (`coordinates.py`). Keypoints keep the encoder's order, which its ball queries depend on, so their cells
are stored as z, y and x in planes of two bytes. Features are lossy, by one of two codecs; in int8, the channels of voxels and
of keypoints have separate ranges:

`fp16`  rounds to half precision: relative error at most 2^-11, absolute error at most 2^-25 below 2^-14.
`int8`  maps each channel of the scene from [min, max] to 0..255: absolute error at most (max - min) / 510 of that channel, plus
        float32 rounding. After a ReLU, min is 0 wherever the channel is 0 in some cell, and then zeros stay zeros.

Features lie channel by channel, (C, M): neighbors in a channel resemble each other, which makes the compressed scene about a
tenth smaller (measured: 8 % with fp16, 11 % with int8).

Nothing here protects what a scan shows. The cells alone are a coarse scan. An attacker who has the encoder can rebuild much of
the scan from the features: on simulated scans, coordinates alone gave an F-score at 0.2 m of .44, coordinates with features .77
(guessing from typical streets: .24). From scenes of PV-RCNN as published, single LiDAR points were computed to within 1 cm.
Both codecs are chosen for size, not to protect anything; `docs/privacy.md` names defences and attacks.

The reader trusts nothing: sizes are limited before memory is taken, the checksum must be there and agree, and the header must
be what the reader expects. Anything else is a `CorruptScene` or a `ForeignScene`.

Read next: `shards.py`, which collects scenes in files.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy
from torch import Tensor

from ...core.config_json import first_difference
from ...core.cut import CutSpec
from ...core.errors import InvalidInput, UpcycleError
from ...core.foreign_text import shown
from ...core.smashed_scene import SMASHED_SCHEMA_VERSION, SmashedScene
from ...core.strict_json import canonical_json, strict_json
from .coordinates import count_cells, pack_coordinates, unpack_coordinates
from .cut_json import CorruptScene, cut_to_json

CODECS = ("fp16", "int8")
FEATURE_LIMIT = 65504.0  # the largest half-precision number
_ROUNDING = 1 + 1e-6  # low + 255 * scale in float32 may end this much beyond the largest feature
FINGERPRINT_PATTERN = re.compile(r"[0-9a-f]{64}")
SCENE_ID_PATTERN = re.compile(r"[0-9a-f]{32}")
HEAD_BYTES = 18  # the longest header of a zstd frame

_MAX_HEADER = 1 << 16  # bytes
_MAX_WINDOW = 1 << 23  # bytes; RFC 8878: what every decoder should support. The window of a zstd frame is memory too
_MAX_AXIS = 1 << 16  # the cell of a keypoint has two bytes per axis
_METADATA_KEY = "smashed_scene"
_HEADER_KEYS = {"schema_version", "codec", "split", "encoder_fingerprint", "scene_id"}  # files call the cut "split"


class ForeignScene(UpcycleError):
    """An intact scene or shard of another encoder, cut or schema version."""


class FeatureOverflow(UpcycleError):
    """A feature that no codec can hold."""


# ------------------------------------------------------------------------------------------------------------ features


def check_codec(codec: str) -> None:
    """Refuse an unknown codec.

    Args:
        codec: Its name.

    Raises:
        InvalidInput: There is no codec of this name.
    """
    if codec not in CODECS:
        raise InvalidInput(f"unknown codec {codec!r}; choose one of {', '.join(CODECS)}")


@torch.no_grad()
def round_trip(features: Tensor, codec: str) -> Tensor:
    """Compute what a reader of the stored scene would see: the quantization alone, without bytes and without gradient.

    Labeled raw scans pass this function on the server, so that the decoder sees their features like those of stored scenes.

    Args:
        features: (M, C) float features of the voxels, or of the keypoints, of ONE scene (the ranges of int8 are per scene and
            channel), on any device, rows in any order.
        codec: "fp16" or "int8".

    Returns:
        (M, C) float32, equal bit for bit to encoding and decoding.

    Raises:
        FeatureOverflow: A feature is NaN or beyond the range of half precision.
        InvalidInput: The codec is unknown.
    """
    return _dequantize(_quantize(features, codec))


def _quantize(features: Tensor, codec: str, prefix: str = "") -> dict[str, Tensor]:
    """(M, C) float -> the stored tensors, each name after `prefix` ("" or "keypoint_"). `FeatureOverflow` in both codecs."""
    check_codec(codec)
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
    """(M, C) float32 from what `_quantize` returned."""
    values = stored[f"{prefix}features"].float()
    if f"{prefix}feature_low" not in stored:
        return values
    return values * stored[f"{prefix}feature_scale"] + stored[f"{prefix}feature_low"]


def _turned(tensor: Tensor) -> Tensor:
    """(M, C) -> (C, M) and back; ranges (C,) stay as they are."""
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor


# ------------------------------------------------------------------------------------------------------- sizes and layout


def _keypoint_sizes(spec: CutSpec) -> tuple[int, int]:
    """Largest number of keypoints per scene, and their channels; (0, 0) for a cut without keypoints."""
    if spec.keypoints is None:
        return (0, 0)
    if max(spec.grid.shape) > _MAX_AXIS:
        raise InvalidInput(
            f"a grid of {spec.grid.shape} voxels (z, y, x) is too large for keypoints: at most {_MAX_AXIS} voxels per axis can be "
            "stored; use larger voxels or a smaller range"
        )
    return (spec.keypoints.count, spec.keypoints.channels)


def _feature_layout(codec: str, m: int, channels: int, prefix: str = "") -> dict[str, tuple[str, list[int]]]:
    layout = {f"{prefix}features": ("F16" if codec == "fp16" else "U8", [channels, m])}
    if codec == "int8":
        layout |= {f"{prefix}feature_low": ("F32", [channels]), f"{prefix}feature_scale": ("F32", [channels])}
    return layout


def _layout(spec: CutSpec, codec: str, width: int, m: int, k: int) -> dict[str, tuple[str, list[int]]]:
    """The safetensors dtype and shape of every tensor in a scene of `m` voxels and `k` keypoints."""
    layout = {"coord_gaps": ("U8", [width, m]), **_feature_layout(codec, m, spec.channels)}
    if spec.keypoints is not None:
        layout |= {"keypoint_cells": ("U16", [3, k]), **_feature_layout(codec, k, spec.keypoints.channels, "keypoint_")}
    return layout


def max_raw_bytes(spec: CutSpec) -> int:
    """Compute a size that no scene of a cut exceeds after decompression.

    Args:
        spec: The cut.

    Returns:
        Bytes of a scene whose every cell and keypoint is occupied.

    Raises:
        InvalidInput: The grid is too large for a smashed scene.
    """
    voxels = count_cells(spec) * (4 + 2 * spec.channels) + 8 * spec.channels
    count, channels = _keypoint_sizes(spec)
    return 8 + _MAX_HEADER + voxels + count * (6 + 2 * channels) + 8 * channels


def max_encoded_bytes(spec: CutSpec) -> int:
    """Compute a size that no encoded scene of a cut exceeds.

    Args:
        spec: The cut.

    Returns:
        Bytes of a scene whose every cell and keypoint is occupied, with zstd's bound for data that does not compress.

    Raises:
        InvalidInput: The grid is too large for a smashed scene.
    """
    raw = max_raw_bytes(spec)
    return raw + raw // 256 + 1024


# --------------------------------------------------------------------------------------------------------------- writing


def encode_scene(scene: SmashedScene) -> bytes:
    """Encode a scene as one zstd-compressed safetensors file, quantized by `scene.codec`.

    Args:
        scene: The scene.

    Returns:
        The bytes. Equal scenes give equal bytes.

    Raises:
        FeatureOverflow: A feature is beyond half precision.
        InvalidInput: The codec is unknown, the grid is too large, or `scene_id` is not 32 hexadecimal digits (a name, a time or
            a serial number in it would leave the vehicle).
    """
    count_cells(scene.spec)
    _keypoint_sizes(scene.spec)
    stored = _quantize(scene.features, scene.codec)
    if scene.spec.keypoints is not None:
        stored |= _quantize(scene.keypoint_features, scene.codec, "keypoint_")
    if not SCENE_ID_PATTERN.fullmatch(scene.scene_id):
        raise InvalidInput(
            f"scene_id must be 32 random hexadecimal digits (secrets.token_hex(16)), found {shown(scene.scene_id, most=80)!r}"
        )
    if not FINGERPRINT_PATTERN.fullmatch(scene.encoder_fingerprint):
        raise InvalidInput(
            f"encoder_fingerprint must be 64 hexadecimal digits, found {shown(scene.encoder_fingerprint, most=80)!r}"
        )
    header = {
        "schema_version": scene.schema_version,
        "codec": scene.codec,
        "split": cut_to_json(scene.spec),
        "encoder_fingerprint": scene.encoder_fingerprint,
        "scene_id": scene.scene_id,
    }
    arrays = {name: _turned(tensor).cpu().numpy() for name, tensor in stored.items()}
    arrays["coord_gaps"] = pack_coordinates(scene.coords.cpu().numpy(), scene.spec)
    if scene.spec.keypoints is not None:
        arrays["keypoint_cells"] = np.ascontiguousarray(scene.keypoint_cells.cpu().numpy().astype("<u2").T)
    raw = safetensors_numpy.save(arrays, metadata={_METADATA_KEY: canonical_json(header).decode()})
    return zstandard.ZstdCompressor(level=1, write_checksum=True, write_content_size=True).compress(raw)


# --------------------------------------------------------------------------------------------------------------- reading


def decode_scene(data: bytes, *, expected_spec: CutSpec, expected_fingerprint: str) -> SmashedScene:
    """Read a scene from bytes that come from outside; memory is limited by the expected grid and keypoints.

    Args:
        data: What `encode_scene` returned, or anything else.
        expected_spec: The cut of the encoder that the reader expects.
        expected_fingerprint: Its encoder fingerprint, 64 hexadecimal digits.

    Returns:
        The scene, its features float32 after quantization.

    Raises:
        CorruptScene: The bytes are damaged or are not a scene.
        ForeignScene: The scene is intact, but of another encoder, cut or schema version.
        InvalidInput: The scene holds NaN, or keypoints twice in a cell or outside the grid.

    A scene whose features would lie beyond half precision is damaged or forged, and a `CorruptScene`: no vehicle writes one.
    """
    raw = _decompress(data, expected_spec)
    header, tensors = _read_header(raw)
    _check_header(header, expected_spec, expected_fingerprint)
    width, m = _declared(tensors, "coord_gaps", (1, 4), (0, count_cells(expected_spec)))
    count, _ = _keypoint_sizes(expected_spec)
    k = 0 if expected_spec.keypoints is None else _declared(tensors, "keypoint_cells", (3, 3), (0, count))[1]
    layout = _layout(expected_spec, header["codec"], width, m, k)
    if tensors != layout:
        raise CorruptScene(f"a scene of {m} voxels and {k} keypoints must hold {layout}, found {shown(tensors, most=300)}")
    try:
        arrays = safetensors_numpy.load(raw)
    except (SafetensorError, ValueError) as error:
        raise CorruptScene(f"the tensors of a scene cannot be read: {error}") from error
    coords = torch.from_numpy(unpack_coordinates(arrays.pop("coord_gaps"), expected_spec))
    keypoint_cells = arrays.pop("keypoint_cells", np.zeros((3, 0), "<u2")).T.astype(np.int32)
    stored = {name: _turned(torch.from_numpy(array)) for name, array in arrays.items()}
    for prefix in ("", "keypoint_"):
        _check_ranges(stored, prefix)
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


def _check_ranges(stored: dict[str, Tensor], prefix: str) -> None:
    """Refuse features that no vehicle writes: beyond half precision, or of an int8 channel with a negative scale."""
    what = f"{prefix.replace('_', ' ')}channel"
    if f"{prefix}feature_low" in stored:
        low, scale = stored[f"{prefix}feature_low"].double(), stored[f"{prefix}feature_scale"].double()
        limit = FEATURE_LIMIT * _ROUNDING
        bad = ~((low.abs() <= limit) & (scale >= 0) & ((low + 255 * scale).abs() <= limit))  # true for NaN as well
        if bad.any():
            channel = int(bad.nonzero()[0])
            raise CorruptScene(
                f"{what} {channel} of a scene starts at {low[channel].item():g} and has steps of {scale[channel].item():g}; features lie "
                f"in ±{FEATURE_LIMIT:g}, steps are not negative, and neither is NaN"
            )
    elif f"{prefix}features" in stored:
        bad = ~stored[f"{prefix}features"].isfinite().all(0)
        if bad.any():
            raise CorruptScene(f"{what} {int(bad.nonzero()[0])} of a scene holds NaN or inf; features lie in ±{FEATURE_LIMIT:g}")


def declared_raw_bytes(head: bytes) -> int:
    """Read the number of bytes that a scene declares for its content, from the first bytes of it.

    Args:
        head: The first `HEAD_BYTES` bytes of an encoded scene, or all of a shorter one.

    Returns:
        Bytes; 0 where the head is not that of a zstd frame with a size, which `decode_scene` refuses.
    """
    try:
        size = zstandard.get_frame_parameters(head).content_size
    except zstandard.ZstdError:
        return 0
    return 0 if size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR) else int(size)


def scene_id_of(data: bytes) -> str:
    """Read the identifier of an encoded scene without decoding its features.

    Args:
        data: The bytes of a scene that was verified before.

    Returns:
        32 hexadecimal digits.

    Raises:
        CorruptScene: The bytes are damaged or are not a scene.
    """
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data) as reader:
            size = reader.read(8)
            raw = size + reader.read(min(int.from_bytes(size, "little"), _MAX_HEADER))
    except zstandard.ZstdError as error:
        raise CorruptScene(f"the zstd frame of a scene is damaged: {error}") from error
    scene_id = _read_header(raw)[0].get("scene_id")
    if not isinstance(scene_id, str) or not SCENE_ID_PATTERN.fullmatch(scene_id):
        raise CorruptScene("the identifier of a scene must be 32 hexadecimal digits")
    return scene_id


def _decompress(data: bytes, spec: CutSpec) -> bytes:
    """The content of the zstd frame, after every declared size was compared with what `spec` allows."""
    if len(data) > max_encoded_bytes(spec):
        raise CorruptScene(f"a scene of {len(data)} bytes is longer than this cut allows ({max_encoded_bytes(spec)}); refused")
    try:
        frame = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError as error:
        raise CorruptScene(f"a scene must be one zstd frame, and its header cannot be read: {error}") from error
    # zstandard ignores max_output_size when the frame declares its size, so the declaration itself is checked.
    if not frame.has_checksum or frame.dict_id or not 8 < frame.content_size <= max_raw_bytes(spec):
        raise CorruptScene(
            f"the zstd frame of a scene must carry a checksum and declare 9..{max_raw_bytes(spec)} bytes; found checksum "
            f"{bool(frame.has_checksum)}, dictionary {frame.dict_id}, {frame.content_size} bytes"
        )
    if frame.window_size > max(_MAX_WINDOW, frame.content_size):
        raise CorruptScene(f"the zstd frame of a scene asks for a window of {frame.window_size} bytes; refused")
    try:
        raw = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptScene(f"the zstd frame of a scene is damaged: {error}") from error
    if len(raw) != frame.content_size:
        raise CorruptScene(f"the zstd frame of a scene declares {frame.content_size} bytes and holds {len(raw)}")
    return raw


def _read_header(raw: bytes) -> tuple[dict[str, Any], dict[str, tuple[str, list[int]]]]:
    """The header of the scene, and dtype and shape of each tensor, before any tensor is made."""
    size = int.from_bytes(raw[:8], "little")
    if not 2 <= size <= min(_MAX_HEADER, len(raw) - 8):
        raise CorruptScene(f"the safetensors header declares {size} bytes; at most {_MAX_HEADER} are allowed in a scene")
    entries = strict_json(raw[8 : 8 + size], "the safetensors header of a scene", CorruptScene)
    metadata = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or metadata.keys() != {_METADATA_KEY} or not isinstance(metadata[_METADATA_KEY], str):
        raise CorruptScene("the safetensors file holds no smashed scene: the metadata of one are missing")
    header = strict_json(metadata[_METADATA_KEY].encode("utf-8", "surrogatepass"), "the header of a scene", CorruptScene)
    if not isinstance(header, dict) or "schema_version" not in header:
        raise CorruptScene("the header of a scene holds no schema version")
    tensors = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            raise CorruptScene(f"the tensor {shown(name, most=80)!r} of a scene has no shape")
        tensors[name] = (str(entry.get("dtype")), entry["shape"])
    return header, tensors


def _check_header(header: dict[str, Any], spec: CutSpec, fingerprint: str) -> None:
    if header["schema_version"] != SMASHED_SCHEMA_VERSION:
        raise ForeignScene(
            f"the scene has schema version {shown(header['schema_version'], most=20)}, this reader knows {SMASHED_SCHEMA_VERSION}; "
            "update the older side"
        )
    if header.keys() != _HEADER_KEYS:
        raise CorruptScene(f"the header of a scene must hold {sorted(_HEADER_KEYS)}, found {shown(sorted(header))}")
    if not isinstance(header["codec"], str) or header["codec"] not in CODECS:
        raise CorruptScene(f"the codec of a scene must be one of {CODECS}, found {shown(header['codec'], most=80)!r}")
    if not isinstance(header["scene_id"], str) or not SCENE_ID_PATTERN.fullmatch(header["scene_id"]):
        raise CorruptScene("the identifier of a scene must be 32 hexadecimal digits")
    if header["encoder_fingerprint"] != fingerprint:
        raise ForeignScene(
            f"the scene was made by encoder {shown(header['encoder_fingerprint'], most=64)}, expected {fingerprint}; features of two "
            "encoders do not mix: update the vehicle or train a decoder for its encoder"
        )
    difference = first_difference(header["split"], cut_to_json(spec))
    if difference is not None:
        raise ForeignScene(f"the scene was made at another cut than the expected one: {shown(difference, most=300)}")


def _declared(
    tensors: dict[str, tuple[str, list[int]]], name: str, rows: tuple[int, int], columns: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns that the header declares for a tensor, each within its limits."""
    shape = tensors.get(name, ("", []))[1]
    bounds = (rows, columns)
    if len(shape) != 2 or not all(type(n) is int and low <= n <= high for n, (low, high) in zip(shape, bounds, strict=True)):
        raise CorruptScene(
            f"{name} must be ({rows[0]}..{rows[1]}, {columns[0]}..{columns[1]}) in this scene, found {shown(shape, most=80)}"
        )
    return (shape[0], shape[1])

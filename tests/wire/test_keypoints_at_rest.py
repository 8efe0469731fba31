"""Keypoints in a file: exact cells in the encoder's order, the codecs of the voxels, no way to express a raw point, no trust."""

import json
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy

import tiny
from upcycle3d.core.cut import CutSpec, KeypointSpec, VoxelGrid
from upcycle3d.core.errors import InvalidInput, UpcycleError
from upcycle3d.core.smashed_scene import SmashedScene
from upcycle3d.perception.wire.codec import (
    CODECS,
    FeatureOverflow,
    ForeignScene,
    decode_scene,
    encode_scene,
    max_encoded_bytes,
    round_trip,
)
from upcycle3d.perception.wire.cut_json import CorruptScene, cut_from_json, cut_to_json

PLAIN, FINGERPRINT = tiny.CUT, tiny.FINGERPRINT
SPEC = replace(PLAIN, keypoints=KeypointSpec(count=64, channels=5))


def scene(keypoints: int, codec: str = "fp16", seed: int = 0, spread: float = 1.0, voxels: int = 20) -> SmashedScene:
    """Random cells of the input grid in random order."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(8 * 32 * 32, generator=generator)[:keypoints]
    return SmashedScene(
        spec=SPEC,
        coords=torch.stack([torch.arange(voxels) * 0, torch.arange(voxels), torch.arange(voxels)], 1).to(torch.int32),
        features=torch.randn(voxels, 4, generator=generator),
        keypoint_cells=tiny.cells(index),
        keypoint_features=torch.randn(keypoints, 5, generator=generator) * spread,
        codec=codec,
        encoder_fingerprint=FINGERPRINT,
        scene_id=f"{seed:032x}",
    )


def decode(data: bytes, spec: CutSpec = SPEC) -> SmashedScene:
    return decode_scene(data, expected_spec=spec, expected_fingerprint=FINGERPRINT)


def content(data: bytes) -> tuple[bytes, dict[str, object], bytes]:
    """The safetensors file in a scene: all of it, its header, and its tensors' bytes."""
    raw = zstandard.ZstdDecompressor().decompress(data)
    size = int.from_bytes(raw[:8], "little")
    return raw, json.loads(raw[8 : 8 + size]), raw[8 + size :]


def repacked(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(raw)


def with_arrays(data: bytes, **changes) -> bytes:
    """A scene whose tensors were exchanged (None: taken out), under a valid checksum."""
    raw, header, _ = content(data)
    arrays = safetensors_numpy.load(raw) | changes
    kept = {name: array for name, array in arrays.items() if array is not None}
    return repacked(safetensors_numpy.save(kept, metadata=header["__metadata__"]))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 64), st.sampled_from(CODECS), st.integers(0, 99), st.sampled_from([1e-6, 1.0, 3000.0]))
def test_decoding_gives_exact_cells_in_order_and_features_within_the_documented_error(keypoints, codec, seed, spread):
    original = scene(keypoints, codec, seed, spread)
    decoded = decode(encode_scene(original))
    assert torch.equal(decoded.keypoint_cells, original.keypoint_cells)
    assert torch.equal(decoded.keypoint_features, round_trip(original.keypoint_features, codec))
    assert torch.equal(decoded.features, round_trip(original.features, codec))  # the voxels' ranges are their own
    x, error = original.keypoint_features, (decoded.keypoint_features - original.keypoint_features).abs()
    if codec == "fp16":
        assert (error <= x.abs() * 2**-11 + 2**-25).all()
    elif keypoints:
        step = (x.amax(0) - x.amin(0)) / 255
        assert (error <= step / 2 * (1 + 1e-4) + x.abs().amax(0) * 2**-22).all()


@pytest.mark.parametrize("codec", CODECS)
def test_a_scene_without_voxels_or_keypoints_is_a_scene_of_its_cut(codec):
    decoded = decode(encode_scene(scene(0, codec, voxels=0)))
    assert decoded.keypoint_cells.shape == (0, 3)
    assert decoded.keypoint_features.shape == (0, 5)
    assert decoded.spec == SPEC


def test_a_cut_without_keypoints_has_not_a_byte_of_them_beyond_one_word_in_its_header():
    with_keypoints = scene(8)
    plain = SmashedScene(
        spec=PLAIN,
        coords=with_keypoints.coords,
        features=with_keypoints.features,
        codec="fp16",
        encoder_fingerprint=FINGERPRINT,
        scene_id="0" * 32,
    )
    _, header, tensors = content(encode_scene(plain))
    metadata = header.pop("__metadata__")["smashed_scene"]
    assert header.keys() == {"coord_gaps", "features"}
    assert len(tensors) == 20 + 20 * 4 * 2
    assert json.loads(metadata)["split"]["keypoints"] is None
    assert len(decode(encode_scene(plain), PLAIN).keypoint_cells) == 0


@pytest.mark.parametrize("codec", CODECS)
def test_keypoints_take_six_bytes_and_their_features(codec):
    _, header, _ = content(encode_scene(scene(8, codec)))
    assert header["keypoint_cells"] | {"data_offsets": 0} == {"dtype": "U16", "shape": [3, 8], "data_offsets": 0}
    assert header["keypoint_features"]["shape"] == [5, 8]
    assert header.keys() >= ({"keypoint_feature_low", "keypoint_feature_scale"} if codec == "int8" else set())
    assert max_encoded_bytes(SPEC) - max_encoded_bytes(PLAIN) >= 64 * (6 + 2 * 5) + 8 * 5


def test_a_keypoint_feature_beyond_half_precision_names_its_channel():
    broken = scene(3)
    broken.keypoint_features[1, 4] = 1e5
    with pytest.raises(FeatureOverflow, match="keypoint channel 4 reaches 100000"):
        encode_scene(broken)


# ------------------------------------------------------------------------------------------------------------ no raw point


def test_a_cut_whose_keypoints_are_raw_points_has_no_spelling_in_a_file():
    raw = replace(PLAIN, keypoints=KeypointSpec(count=64, channels=5, source="raw_points"))
    with pytest.raises(InvalidInput, match=r'raw points of the scan; only voxel centers .*keypoint_source="voxel_centers"'):
        cut_to_json(raw)
    with pytest.raises(InvalidInput, match="raw points of the scan"):
        decode(encode_scene(scene(3)), raw)
    with pytest.raises(CorruptScene, match="count and channels"):
        cut_from_json(cut_to_json(SPEC) | {"keypoints": {"count": 64, "channels": 5, "source": "raw_points"}}, "test")


def test_float_coordinates_cannot_stand_in_for_cells():
    good = encode_scene(scene(8))
    points = safetensors_numpy.load(content(good)[0])["keypoint_cells"].astype("f4") + 0.25
    with pytest.raises(CorruptScene, match="must hold"):
        decode(with_arrays(good, keypoint_cells=points))


# ---------------------------------------------------------------------------------------------------------- a stranger's bytes


def test_the_cut_survives_json_and_hostile_keypoints_are_refused():
    assert cut_from_json(json.loads(json.dumps(cut_to_json(SPEC))), "test") == SPEC
    assert cut_from_json(cut_to_json(PLAIN), "test") == PLAIN
    most = cut_to_json(SPEC) | {"keypoints": {"count": 65_536, "channels": 65_536}}
    assert cut_from_json(most, "test").keypoints == KeypointSpec(count=65_536, channels=65_536)
    for bad in (
        0,
        [],
        {},
        {"count": 64},
        {"count": 0, "channels": 5},
        {"count": 65_537, "channels": 5},
        {"count": 64, "channels": 0},
        {"count": 64, "channels": 65_537},
        {"count": 64.0, "channels": 5},
        {"count": True, "channels": 5},
    ):
        with pytest.raises(CorruptScene, match="test"):
            cut_from_json(cut_to_json(SPEC) | {"keypoints": bad}, "test")
    old = cut_to_json(PLAIN)
    del old["keypoints"]
    with pytest.raises(CorruptScene, match="keypoints"):
        cut_from_json(old, "test")


def test_another_cuts_keypoints_are_foreign():
    good = encode_scene(scene(8))
    more = replace(SPEC, keypoints=KeypointSpec(count=65, channels=5))
    for other, difference in ((PLAIN, r"keypoints: stored \{.*\}, now None"), (more, r"keypoints\.count: stored 64, now 65")):
        with pytest.raises(ForeignScene, match=difference):
            decode(good, other)


def test_more_keypoints_than_the_cut_allows_are_refused_before_tensors_are_made():
    raw, header, tensors = content(encode_scene(scene(8)))
    for shape in ([3, 65], [3, 1 << 40], [3, -1], [3, 8.0], [2, 8], [24]):
        header["keypoint_cells"]["shape"] = shape
        text = json.dumps(header).encode()
        with pytest.raises(CorruptScene, match=r"keypoint_cells must be \(3..3, 0..64\)"):
            decode(repacked(len(text).to_bytes(8, "little") + text + tensors))
    assert decode(repacked(raw)).keypoint_cells.shape == (8, 3)


def test_cells_twice_outside_or_without_their_features_are_refused():
    good = encode_scene(scene(8, "int8"))
    arrays = safetensors_numpy.load(content(good)[0])
    twice, outside = arrays["keypoint_cells"].copy(), arrays["keypoint_cells"].copy()
    twice[:, 3] = twice[:, 5]
    outside[1, 2] = 32
    for changes, message in [
        ({"keypoint_cells": twice}, "unique"),
        ({"keypoint_cells": outside}, "leave the grid"),
        ({"keypoint_cells": None}, "keypoint_cells must be"),
        ({"keypoint_cells": arrays["keypoint_cells"][:, :7].copy()}, "must hold"),
        ({"keypoint_features": None}, "must hold"),
        ({"keypoint_feature_low": None}, "must hold"),
        ({"keypoint_feature_scale": arrays["keypoint_feature_scale"] * float("nan")}, "NaN"),
    ]:
        with pytest.raises(UpcycleError, match=message):
            decode(with_arrays(good, **changes))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data(), st.sampled_from(CODECS))
def test_a_flipped_bit_is_an_error_or_changes_nothing_and_damage_under_a_valid_checksum_is_typed(data, codec):
    good = encode_scene(scene(64, codec))
    expected = decode(good)
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with suppress(UpcycleError):
        decoded = decode(bytes(bad))
        assert torch.equal(decoded.keypoint_cells, expected.keypoint_cells)
        assert torch.equal(decoded.keypoint_features, expected.keypoint_features)
    raw = bytearray(content(good)[0])
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with suppress(UpcycleError):
        decode(repacked(bytes(raw)))


def test_a_grid_beyond_two_bytes_an_axis_holds_no_keypoints():
    def far(voxels: int) -> SmashedScene:
        grid = VoxelGrid(range=(0.0, 0.0, 0.0, float(voxels), 1.0, 1.0), voxel_size=(1.0, 1.0, 1.0))
        last = torch.tensor([[0, 0, voxels - 1]], dtype=torch.int32)
        return replace(scene(1), spec=replace(SPEC, grid=grid), keypoint_cells=last)

    fits, wide = far(65_536), far(65_537)
    assert decode(encode_scene(fits), fits.spec).keypoint_cells.tolist() == [[0, 0, 65_535]]
    with pytest.raises(InvalidInput, match="too large for keypoints"):
        encode_scene(wide)
    with pytest.raises(InvalidInput, match="too large for keypoints"):
        decode(encode_scene(fits), wide.spec)
    assert max_encoded_bytes(replace(wide.spec, keypoints=None)) > 0

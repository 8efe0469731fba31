"""What the codec promises: exact cells, bounded error in features, the same numbers on both sides, and no trust in bytes."""

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
    scene_id_of,
)
from upcycle3d.perception.wire.cut_json import CorruptScene, cut_from_json, cut_to_json

SPEC, FINGERPRINT = tiny.CUT, tiny.FINGERPRINT


def scene(cells: list[int], codec: str, seed: int = 0, spread: float = 1.0, offset: float = 0.0) -> SmashedScene:
    index = torch.tensor(sorted(set(cells)), dtype=torch.int64)
    features = torch.randn(len(index), 4, generator=torch.Generator().manual_seed(seed)) * spread + offset
    return SmashedScene(
        spec=SPEC,
        coords=tiny.cells(index),
        features=features,
        codec=codec,
        encoder_fingerprint=FINGERPRINT,
        scene_id=f"{seed:032x}",
    )


def decode(data: bytes) -> SmashedScene:
    return decode_scene(data, expected_spec=SPEC, expected_fingerprint=FINGERPRINT)


def repacked(data: bytes, edit) -> bytes:
    """`data` with its safetensors content replaced by `edit(raw)`, in a valid frame."""
    raw = zstandard.ZstdDecompressor().decompress(data)
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(edit(raw))


def with_header(**changes):
    def edit(raw: bytes) -> bytes:
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["smashed_scene"])
        return safetensors_numpy.save(safetensors_numpy.load(raw), metadata={"smashed_scene": json.dumps(header | changes)})

    return edit


CELLS = st.lists(st.integers(0, 2047), max_size=60)
QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@QUICK
@given(
    CELLS, st.sampled_from(CODECS), st.integers(0, 99), st.sampled_from([1e-6, 1.0, 3000.0]), st.sampled_from([0.0, 0.5, -900.0])
)
def test_decoding_gives_exact_cells_and_features_within_the_documented_error(cells, codec, seed, spread, offset):
    original = scene(cells, codec, seed, spread, offset)
    decoded = decode(encode_scene(original))
    assert torch.equal(decoded.coords, original.coords)
    assert (decoded.codec, decoded.scene_id, decoded.encoder_fingerprint) == (codec, original.scene_id, FINGERPRINT)
    x, error = original.features, (decoded.features - original.features).abs()
    if codec == "fp16":
        assert (error <= x.abs() * 2**-11 + 2**-25).all()
    elif len(x):
        step = (x.amax(0) - x.amin(0)) / 255
        assert (error <= step / 2 * (1 + 1e-4) + x.abs().amax(0) * 2**-22).all()


@QUICK
@given(CELLS, st.sampled_from(CODECS), st.integers(0, 99))
def test_round_trip_of_live_features_is_bit_equal_to_encoding_and_decoding_in_any_row_order(cells, codec, seed):
    original = scene(cells, codec, seed)
    stored = decode(encode_scene(original)).features
    order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(seed))
    live = original.features[order].requires_grad_()
    assert torch.equal(round_trip(live, codec), stored[order])
    assert not round_trip(live, codec).requires_grad


@pytest.mark.parametrize("codec", CODECS)
def test_round_trip_takes_half_precision_features_and_gives_float32(codec):
    features = torch.rand(50, 4).half()
    assert round_trip(features, codec).dtype == torch.float32
    assert torch.equal(round_trip(features, "fp16"), features.float())


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_after_a_relu_stay_zeros(codec):
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(1)).relu()
    assert torch.equal(round_trip(features, codec) == 0, features < (features.amax(0) / 510 if codec == "int8" else 2**-25))


def test_a_channel_that_never_changes_is_exact_in_int8():
    features = torch.full((10, 4), 0.1)
    assert torch.equal(round_trip(features, "int8"), features)


def test_every_cell_of_the_grid_and_the_very_last_cell_alone_survive():
    assert len(decode(encode_scene(scene(list(range(2048)), "int8"))).coords) == 2048
    assert decode(encode_scene(scene([2047], "fp16"))).coords.tolist() == [[1, 31, 31]]


def test_equal_scenes_give_equal_bytes():
    assert encode_scene(scene([3, 5], "int8")) == encode_scene(scene([3, 5], "int8"))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [65505.0, -1e6, float("nan"), float("inf")])
def test_a_feature_beyond_half_precision_is_an_error_that_names_the_channel(codec, value):
    features = torch.zeros(3, 4)
    features[1, 2] = value
    with pytest.raises(FeatureOverflow, match="channel 2"):
        round_trip(features, codec)
    assert torch.equal(round_trip(torch.full((1, 4), 65504.0), codec), torch.full((1, 4), 65504.0))


def test_nothing_but_random_hexadecimal_can_be_a_scene_id():
    named = SmashedScene(
        spec=SPEC,
        coords=torch.zeros(0, 3, dtype=torch.int32),
        features=torch.zeros(0, 4),
        codec="fp16",
        encoder_fingerprint=FINGERPRINT,
        scene_id="vehicle7_2026-11-24T20:00:00",
    )
    with pytest.raises(InvalidInput, match="scene_id"):
        encode_scene(named)


def test_an_unknown_codec_names_the_known_ones():
    with pytest.raises(InvalidInput, match="fp16"):
        round_trip(torch.zeros(1, 4), "fp8")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.data(), st.sampled_from(CODECS))
def test_a_flipped_bit_is_an_error_or_changes_nothing(data, codec):
    original = scene(list(range(0, 2048, 7)), codec)
    good = encode_scene(original)
    place = data.draw(st.one_of(st.integers(0, 16), st.integers(0, len(good) - 1)))
    bad = bytearray(good)
    bad[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decoded = decode(bytes(bad))
    except UpcycleError:
        return
    expected = decode(good)  # zstd's frame header has a bit that means nothing
    assert torch.equal(decoded.coords, expected.coords)
    assert torch.equal(decoded.features, expected.features)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data(), st.sampled_from(CODECS))
def test_damage_under_a_valid_checksum_is_a_typed_error_or_a_valid_scene(data, codec):
    """A stranger can compute checksums; then only validity can be promised, never a crash."""
    good = encode_scene(scene(list(range(0, 2048, 31)), codec))

    def edit(raw: bytes) -> bytes:
        damaged = bytearray(raw)
        for _ in range(data.draw(st.integers(1, 4))):
            damaged[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        return bytes(damaged[: data.draw(st.sampled_from([len(raw), len(raw) - 1, 9, 20]))])

    with suppress(UpcycleError):
        decode(repacked(good, edit))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_typed_error(data):
    with pytest.raises(UpcycleError):
        decode(data)


@pytest.mark.parametrize("keep", [0, 1, 5, 20, -1])
def test_a_cut_off_scene_is_corrupt(keep):
    with pytest.raises(CorruptScene):
        decode(encode_scene(scene([1, 2, 3], "fp16"))[:keep])


def test_data_after_the_scene_is_refused():
    with pytest.raises(CorruptScene):
        decode(encode_scene(scene([1], "fp16")) + b"x")


def test_a_bomb_is_refused_by_its_declared_size_before_memory_is_taken():
    bomb = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(bytes(64 << 20))
    assert len(bomb) < 16_000
    with pytest.raises(CorruptScene, match="67108864 bytes"):
        decode(bomb)
    with pytest.raises(CorruptScene, match="longer than this cut allows"):
        decode(bytes(max_encoded_bytes(SPEC) + 1))


def test_a_frame_without_checksum_or_without_size_is_refused():
    raw = zstandard.ZstdDecompressor().decompress(encode_scene(scene([1], "fp16")))
    with pytest.raises(CorruptScene, match="checksum"):
        decode(zstandard.ZstdCompressor(level=1).compress(raw))
    with pytest.raises(CorruptScene, match="declare"):
        decode(zstandard.ZstdCompressor(level=1, write_checksum=True, write_content_size=False).compress(raw))


def test_a_huge_safetensors_header_is_refused():
    with pytest.raises(CorruptScene, match="header declares"):
        decode(repacked(encode_scene(scene([1], "fp16")), lambda raw: (1 << 60).to_bytes(8, "little") + raw[8:]))


def test_more_voxels_than_cells_are_refused_before_tensors_are_made():
    def edit(raw: bytes) -> bytes:
        size = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + size])
        entries["coord_gaps"]["shape"] = [1, 2049]
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + size :]

    with pytest.raises(CorruptScene, match=r"coord_gaps must be .*2048"):
        decode(repacked(encode_scene(scene([1], "fp16")), edit))


def test_coordinates_outside_the_grid_are_corrupt():
    def edit(raw: bytes) -> bytes:
        arrays = safetensors_numpy.load(raw)
        size = int.from_bytes(raw[:8], "little")
        arrays["coord_gaps"] = arrays["coord_gaps"] * 0 + 255
        return safetensors_numpy.save(arrays, metadata=json.loads(raw[8 : 8 + size])["__metadata__"])

    with pytest.raises(CorruptScene, match="leave the grid"):
        decode(repacked(encode_scene(scene(list(range(0, 2048, 200)), "fp16")), edit))


def test_another_encoder_cut_or_schema_version_is_foreign_and_says_which():
    good = encode_scene(scene([1, 9], "int8"))
    with pytest.raises(ForeignScene, match="cdcd"):
        decode_scene(good, expected_spec=SPEC, expected_fingerprint="cd" * 32)
    other = replace(SPEC, layer="backbone.other")
    with pytest.raises(ForeignScene, match=r"backbone\.other"):
        decode_scene(good, expected_spec=other, expected_fingerprint=FINGERPRINT)
    for version in (1, 3):
        with pytest.raises(ForeignScene, match=f"version {version}, this reader knows 2; update the older side"):
            decode(repacked(good, with_header(schema_version=version, new_field=1)))


@pytest.mark.parametrize("change", [{"codec": "raw"}, {"scene_id": "gps 48.1, 11.5"}, {"pose": [0, 0, 0]}, {"codec": "fp16"}])
def test_a_header_that_holds_something_else_is_corrupt(change):
    with pytest.raises(CorruptScene):
        decode(repacked(encode_scene(scene([1, 9], "int8")), with_header(**change)))


def test_the_cut_survives_json_and_a_hostile_one_is_refused():
    assert cut_from_json(json.loads(json.dumps(cut_to_json(SPEC))), "test") == SPEC
    for name, value in [
        ("channels", 1e3),
        ("channels", True),
        ("shape", [1, 1]),
        ("stride", [0, 1, 1]),
        ("layer", "../x"),
        ("grid", []),
    ]:
        with pytest.raises(CorruptScene, match="test"):
            cut_from_json(cut_to_json(SPEC) | {name: value}, "test")
    endless = {"range": [0.0, 0.0, 0.0, float("inf"), 1.0, 1.0], "voxel_size": [1.0, 1.0, 1.0]}
    with pytest.raises(CorruptScene, match="test"):
        cut_from_json(cut_to_json(SPEC) | {"grid": endless}, "test")


def test_raw_points_cannot_be_put_into_a_smashed_scene():
    points = torch.rand(5, 3)
    for coords, features in [
        (points, torch.zeros(5, 4)),  # float coordinates
        (torch.zeros(5, 4, dtype=torch.int32), torch.zeros(5, 4)),  # a column too many
        (torch.arange(15, dtype=torch.int32).view(5, 3) + 100, torch.zeros(5, 4)),  # outside the grid
        (torch.tensor([[0, 0, 0], [0, 0, 0]], dtype=torch.int32), torch.zeros(2, 4)),  # several points in a cell
        (torch.tensor([[0, 0, 1], [0, 0, 0]], dtype=torch.int32), torch.zeros(2, 4)),  # an order that tells about the scan
        (torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 5)),  # more channels than the cut has
        (torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int32)),
    ]:
        with pytest.raises(InvalidInput):
            SmashedScene(
                spec=SPEC, coords=coords, features=features, codec="fp16", encoder_fingerprint=FINGERPRINT, scene_id="0" * 32
            )


def with_ranges(low: list[float], scale: list[float]):
    def edit(raw: bytes) -> bytes:
        size = int.from_bytes(raw[:8], "little")
        metadata = json.loads(raw[8 : 8 + size])["__metadata__"]
        arrays = safetensors_numpy.load(raw)
        arrays["feature_low"][:], arrays["feature_scale"][:] = low, scale
        return safetensors_numpy.save(arrays, metadata=metadata)

    return edit


@pytest.mark.parametrize(
    ("low", "scale"),
    [
        (0.0, 1e36),
        (0.0, -1.0),
        (0.0, 257.0),
        (-65504.5, 1.0),
        (7e4, 0.0),
        (-65504.0, 514.0),
        (float("nan"), 1.0),
        (0.0, float("inf")),
    ],
)
def test_a_forged_scene_whose_features_leave_half_precision_is_corrupt_with_the_channel_named(low, scale):
    good = encode_scene(scene([3, 77], "int8"))
    with pytest.raises(CorruptScene, match="channel 2"):
        decode(repacked(good, with_ranges([0.0, 0.0, low, 0.0], [1.0, 0.0, scale, 256.0])))


def test_the_largest_features_that_a_vehicle_may_send_are_read():
    widest = replace(
        scene([3, 77], "int8"), features=torch.tensor([[65504.0, -65504.0, 0.0, 1.0], [-65504.0, 65504.0, 0.0, 1.0]])
    )
    for codec in CODECS:
        assert decode(encode_scene(replace(widest, codec=codec))).features.abs().max() >= 65500


def test_the_name_of_a_scene_is_read_without_its_features():
    for codec in CODECS:
        assert scene_id_of(encode_scene(scene([3, 77], codec, seed=5))) == f"{5:032x}"
    for bad in (b"", b"x" * 40, encode_scene(scene([3], "fp16"))[:30]):
        with pytest.raises(CorruptScene):
            scene_id_of(bad)

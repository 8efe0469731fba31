"""The store: every scene is checked when it is read, and becomes live features that are bit for bit what a vehicle computed."""

import json
import pickle
from contextlib import suppress
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

import tiny
from upcycle3d.core.cut import cells_of_centers
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures
from upcycle3d.core.rig import RigSpec
from upcycle3d.perception.server.ingest import ingest
from upcycle3d.perception.server.methods import METHODS
from upcycle3d.perception.server.store import BrokenStore, SmashedStore, collate_scenes, quantize_features
from upcycle3d.perception.server.store_note import NOTE, MeasuredUploads, StoreNote, read_store_note, write_store_note
from upcycle3d.perception.server.trainer import unlabeled_reader
from upcycle3d.perception.vehicle.extractor import Extractor
from upcycle3d.perception.wire.codec import CODECS, decode_scene, encode_scene, round_trip
from upcycle3d.perception.wire.cut_json import CorruptScene
from upcycle3d.perception.wire.manifest import read_manifest
from uploads import ENCODER, GRID, KEYPOINT_SPEC, OTHER_ENCODER, SPEC, ingest_all, keypoint_scene, scene, upload


@pytest.fixture
def incoming(tmp_path):
    return tmp_path / "incoming"


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def test_a_store_opens_from_a_string_and_a_folder_without_one_says_what_to_do(incoming, store):
    upload(incoming, [scene(0)])
    with pytest.raises(BrokenStore, match="upcycle3d ingest"):
        SmashedStore(store)
    ingest_all(incoming, store)
    assert len(SmashedStore(str(store))) == 1


def test_stores_of_as_many_other_scenes_are_told_apart_by_their_digest(tmp_path):
    """What is computed of a store is kept under this digest; the number of scenes alone would give one store's results to another."""
    scenes, digests = [scene(0), scene(1), scene(2)], []
    for name, chosen in (("a", scenes[:2]), ("b", [scenes[1], scenes[0]]), ("c", scenes[1:])):
        upload(tmp_path / f"incoming_{name}", chosen)
        ingest_all(tmp_path / f"incoming_{name}", tmp_path / name)
        digests.append(SmashedStore(tmp_path / name).digest())
    assert digests[0] == digests[1] != digests[2]


def test_a_store_gives_the_same_scenes_in_the_same_order_however_they_were_sent(tmp_path):
    """Names of shards, ids and the order in a shard are random; training must not depend on them."""
    orders = []
    for name, shards in (("a", [[0, 1, 2], [3, 4]]), ("b", [[4], [2, 3, 0, 1]]), ("c", [[1, 0, 4, 3, 2]])):
        for seeds in shards:
            upload(tmp_path / f"incoming_{name}", [scene(seed) for seed in seeds])
        ingest_all(tmp_path / f"incoming_{name}", tmp_path / name)
        found = SmashedStore(tmp_path / name)
        orders.append([found[i].features.tolist() for i in range(len(found))])
    assert orders[0] == orders[1] == orders[2]


def test_a_store_of_an_earlier_version_keeps_its_order_and_takes_new_scenes(incoming, store):
    upload(incoming, [scene(seed) for seed in range(6)])
    ingest_all(incoming, store)
    table = pq.read_table(store / "catalogue.parquet")
    header = json.loads(table.schema.metadata[b"upcycle3d.smashed_catalogue"]) | {"version": 2}
    reverse = table.take(list(range(6))[::-1]).drop_columns(["order"])
    old = reverse.replace_schema_metadata({b"upcycle3d.smashed_catalogue": json.dumps(header)})
    pq.write_table(old, store / "catalogue.parquet")
    sizes = old["sha256"].to_pylist()
    assert [row.tobytes().hex() for row in SmashedStore(store)._sha256] == sizes
    upload(incoming, [scene(7)])
    ingest_all(incoming, store)
    assert [row.tobytes().hex() for row in SmashedStore(store)._sha256][:6] == sizes
    assert len(SmashedStore(store)) == 7


def test_a_damaged_catalog_says_how_to_rebuild_it(incoming, store):
    upload(incoming, [scene(0)])
    ingest_all(incoming, store)
    path = store / "catalogue.parquet"
    good = path.read_bytes()
    for bad in (b"", b"PAR1", good[: len(good) // 2]):
        path.write_bytes(bad)
        with pytest.raises(BrokenStore, match="rebuilt from the shards"):
            SmashedStore(store)


def test_a_scene_that_changed_on_disk_is_never_returned(incoming, store):
    manifest = read_manifest(upload(incoming, [scene(0), scene(1)]))
    ingest_all(incoming, store)
    tar = store / "shards" / manifest.tar_name
    smashed = SmashedStore(store)
    data = bytearray(tar.read_bytes())
    data[int(smashed._offset[1]) + 30] ^= 1  # scenes stand in the order of their content, members of a tar in random order
    tar.write_bytes(data)
    assert len(smashed[0].coords) == 30
    with pytest.raises(CorruptScene, match="scene 1"):
        smashed[1]
    tar.unlink()
    with pytest.raises(BrokenStore, match="scene 0"):
        smashed[0]
    for index in (2, -1):
        with pytest.raises(IndexError):
            smashed[index]


def test_an_empty_store_has_no_scenes(incoming, store):
    incoming.mkdir()
    assert ingest_all(incoming, store).total_scenes == 0
    assert len(SmashedStore(store)) == 0


def test_forked_data_workers_read_the_same_scenes(incoming, store):
    for i in range(2):
        upload(incoming, [scene(2 * i), scene(2 * i + 1, voxels=10)])
    ingest_all(incoming, store)
    smashed = SmashedStore(store)
    loader = DataLoader(smashed, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for i, got in enumerate(loader):
        assert torch.equal(got.features, smashed[i].features)
        assert got.scene_id == smashed[i].scene_id


def test_a_store_pickles_for_spawned_workers(incoming, store):
    upload(incoming, [scene(0)])
    ingest_all(incoming, store)
    smashed = pickle.loads(pickle.dumps(SmashedStore(store)))
    assert encode_scene(smashed[0]) == encode_scene(SmashedStore(store)[0])


def test_smashed_scenes_become_one_batch_in_order_with_an_empty_last_scene():
    scenes = [scene(0, voxels=5), scene(1, voxels=3), scene(2, voxels=0)]
    batch = collate_scenes(scenes)
    assert batch.batch_size == 3
    assert batch.spec == SPEC
    tiny.assert_in_grid(batch.voxels)
    for i, s in enumerate(scenes):
        assert torch.equal(batch.scene(i).voxels.coords[:, 1:], s.coords)
        assert torch.equal(batch.scene(i).voxels.features, s.features)
    with pytest.raises(InvalidInput, match="do not mix"):
        collate_scenes([scenes[0], scene(0, fingerprint=OTHER_ENCODER)])
    with pytest.raises(InvalidInput, match="at least one"):
        collate_scenes([])


def test_keypoints_are_cataloged_and_become_live_at_the_centers_of_their_cells(incoming, store):
    scenes = [keypoint_scene(0, 12), keypoint_scene(1, 0), keypoint_scene(2, 5)]
    upload(incoming, scenes)
    ingest(incoming, store, expected_fingerprint=ENCODER, expected_spec=KEYPOINT_SPEC)
    smashed = SmashedStore(store)
    sent = {s.scene_id: s for s in scenes}
    read = [smashed[i] for i in range(3)]
    assert smashed.keypoints.tolist() == [len(s.keypoint_cells) for s in read]
    assert sorted(smashed.keypoints.tolist()) == [0, 5, 12]
    batch = collate_scenes(read)
    assert batch.spec == KEYPOINT_SPEC
    for i, s in enumerate(read):
        live = batch.scene(i).keypoints
        assert live.xyz.dtype == torch.float32
        assert torch.equal(cells_of_centers(live.xyz, GRID), sent[s.scene_id].keypoint_cells)
        assert torch.equal(live.features, round_trip(sent[s.scene_id].keypoint_features, "int8"))
    one = replace(scenes[0], keypoint_cells=torch.tensor([[0, 1, 2]], dtype=torch.int32), keypoint_features=torch.ones(1, 3))
    assert collate_scenes([one]).keypoints.xyz.tolist() == [[1.25, -7.25, -1.75]]
    assert collate_scenes([scene(0)]).keypoints is None
    with pytest.raises(InvalidInput, match="do not mix"):
        collate_scenes([scene(0), scenes[0]])


@pytest.mark.parametrize("codec", CODECS)
def test_labeled_features_are_bit_for_bit_what_a_store_would_give(codec):
    encoder = tiny.pv_rcnn(tiny.pv_rcnn_config(width=8, keypoints=64)).encoder.eval()
    clouds = [tiny.frame_with_car(0).points, tiny.frame_with_car(1).points, tiny.NO_POINTS]
    extractor = Extractor(encoder, RigSpec(), codec)
    scenes = [
        decode_scene(
            encode_scene(extractor.smash(c)[0]), expected_spec=extractor.spec, expected_fingerprint=extractor.fingerprint
        )
        for c in clouds
    ]
    expected = collate_scenes(scenes)
    encoder.requires_grad_(False)  # frozen, as in every method that learns from a store
    live = CutFeatures.collate([encoder([c]) for c in clouds])
    found = quantize_features(live, codec)
    assert found.keypoints.starts == expected.keypoints.starts == (0, 64, 128, 128)
    assert torch.equal(found.keypoints.xyz, expected.keypoints.xyz)
    assert torch.equal(found.keypoints.features, expected.keypoints.features)
    assert torch.equal(found.voxels.sorted().coords, expected.voxels.sorted().coords)
    assert torch.equal(found.voxels.sorted().features, expected.voxels.sorted().features)
    assert not torch.equal(found.keypoints.features, live.keypoints.features)


# ------------------------------------------------------------------------------------------------- damage after ingest


def store_of_shards(incoming, store, shards: int, scenes: int = 2) -> SmashedStore:
    for i in range(shards):
        upload(incoming, [scene(10 * i + j) for j in range(scenes)])
    ingest_all(incoming, store)
    return SmashedStore(store)


def flip(tar) -> None:
    """One bit of every kilobyte."""
    data = bytearray(tar.read_bytes())
    for place in range(600, len(data) - 1024, 300):
        data[place] ^= 1
    tar.write_bytes(data)


def swap_for_another(tar) -> None:
    tar.write_bytes(bytes(len(tar.read_bytes())))


@pytest.mark.parametrize("harm", [flip, swap_for_another, lambda tar: tar.unlink(), lambda tar: tar.write_bytes(b"")])
def test_a_shard_that_changed_after_ingest_is_skipped_with_a_sentence_that_names_and_counts_it(incoming, store, harm):
    smashed = store_of_shards(incoming, store, 11)
    tar = next((store / "shards").glob("*.tar"))
    harm(tar)
    lost = {i for i in range(22) if smashed._shards[smashed._shard[i]] == tar.stem}
    with pytest.warns(UserWarning, match=f"shard {tar.stem} is damaged, and the training goes on without its 2 scenes") as told:
        read = [smashed.readable(i).scene_id for i in range(22)]
    assert len(told) == 1
    assert set(read) == {smashed[i].scene_id for i in range(22) if i not in lost}
    again = SmashedStore(store)
    with pytest.warns(UserWarning, match="damaged"):
        assert [again.readable(i).scene_id for i in range(22)] == read  # every worker takes the same scenes instead
    with pytest.raises(IndexError):
        smashed.readable(22)


def test_a_training_stops_where_too_many_scenes_are_damaged(incoming, store):
    smashed = store_of_shards(incoming, store, 4)
    flip(next((store / "shards").glob("*.tar")))
    with pytest.raises(BrokenStore, match=r"2 of 8 scenes of the store .* are in damaged shards, more than 10%"):
        [smashed.readable(i) for i in range(8)]


@pytest.mark.filterwarnings("ignore:shard")
def test_a_training_goes_on_without_a_damaged_shard(incoming, store):
    smashed = store_of_shards(incoming, store, 11)
    flip(next((store / "shards").glob("*.tar")))
    read = unlabeled_reader(METHODS["upcycling"], tiny.upcycle_config(), store=smashed, scans=None)
    ids = {name for step in range(30) for name in read(step).ids}
    assert len(ids) == 20


def edited_catalog(store, column: str, value) -> None:
    path = store / "catalogue.parquet"
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[0] = value
    index = table.schema.get_field_index(column)
    pq.write_table(table.set_column(index, table.schema.field(column), pa.array(values, table.schema.field(column).type)), path)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("shard", "../../etc/passwd"),
        ("shard", None),
        ("offset", -1),
        ("length", 0),
        ("length", 1 << 50),
        ("sha256", "xyz"),
        ("sha256", "é" * 32),
        ("voxels", -3),
        ("voxels", 1 << 30),
        ("codec", "zip\x1b[2J"),
        ("fingerprint", "0" * 64),
        ("keypoints", 5),
    ],
)
def test_a_catalog_with_values_that_no_ingest_writes_is_a_sentence_with_the_command_that_rebuilds_it(
    incoming, store, column, value
):
    store_of_shards(incoming, store, 1)
    edited_catalog(store, column, value)
    with pytest.raises(BrokenStore, match="--rebuild-catalog") as error:
        SmashedStore(store)
    assert column in str(error.value)
    assert "\x1b" not in str(error.value)
    report = ingest(incoming, store, expected_fingerprint=ENCODER, expected_spec=SPEC, rebuild_catalog=True)
    assert (report.total_scenes, len(SmashedStore(store))) == (2, 2)


def test_a_catalog_with_any_flipped_byte_is_a_sentence_or_the_same_catalog(incoming, store):
    smashed = store_of_shards(incoming, store, 2)
    path = store / "catalogue.parquet"
    good = path.read_bytes()
    for place in range(0, len(good), max(1, len(good) // 60)):
        data = bytearray(good)
        data[place] ^= 0x11
        path.write_bytes(data)
        with suppress(BrokenStore):
            assert SmashedStore(store).digest() == smashed.digest()


def test_a_store_keeps_a_note_on_its_uploads(tmp_path):
    assert read_store_note(tmp_path) is None
    measured = MeasuredUploads(codec="int8", text="int8: a trained attack rebuilds scans with F@0.2 m 0.80")
    note = StoreNote(defences="noise:sigma=0.5", measured=(measured,), encoder="0" * 64)
    write_store_note(tmp_path, note)
    assert read_store_note(tmp_path) == note
    (tmp_path / NOTE).write_text('{"defences": 3}')
    with pytest.raises(InvalidInput, match="the option `encoder` of StoreNote is missing"):
        read_store_note(tmp_path)

"""Several stores read as one: every scene once, in a batch with scenes of another rig, and with no scene of another encoder."""

from dataclasses import replace

import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.server import store as store_module
from upcycle3d.perception.server.ingest import ingest
from upcycle3d.perception.server.joined_stores import JoinedStores
from upcycle3d.perception.server.methods import METHODS
from upcycle3d.perception.server.store import BrokenStore, SmashedStore, collate_scenes
from upcycle3d.perception.server.trainer import unlabeled_reader
from uploads import ENCODER, OTHER_ENCODER, OTHER_SPEC, SPEC, scene, upload


def filled(folder, seeds, fingerprint=ENCODER, spec=SPEC, codec="int8") -> SmashedStore:
    """A store with one shard per scene."""
    for seed in seeds:
        upload(folder / "in", [scene(seed, fingerprint=fingerprint, spec=spec, codec=codec)])
    (folder / "in").mkdir(parents=True, exist_ok=True)
    ingest(folder / "in", folder / "store", expected_fingerprint=fingerprint, expected_spec=spec)
    return SmashedStore(folder / "store")


@pytest.fixture
def fleets(tmp_path) -> list[SmashedStore]:
    return [filled(tmp_path / "a", range(3)), filled(tmp_path / "b", range(10, 15), OTHER_ENCODER, codec="fp16")]


def test_every_scene_of_every_store_has_one_place_and_keeps_its_fingerprint(fleets):
    joined, (one, other) = JoinedStores(fleets), fleets
    assert len(joined) == 8
    places = [joined[i].scene_id for i in range(8)]
    assert places == [one[i].scene_id for i in range(3)] + [other[i].scene_id for i in range(5)]
    assert [joined.readable(i).scene_id for i in range(8)] == places
    assert [joined[i].encoder_fingerprint for i in (2, 3)] == [ENCODER, OTHER_ENCODER]
    assert (joined.spec, joined.fingerprints) == (SPEC, (ENCODER, OTHER_ENCODER))
    assert (joined.codec_counts, joined.codecs) == ({"fp16": 5, "int8": 3}, ("fp16", "int8"))
    assert torch.equal(joined.voxels, torch.cat([one.voxels, other.voxels]))
    for outside in (-1, 8):
        with pytest.raises(IndexError, match="the stores hold 8 scenes"):
            joined[outside]


def test_the_digest_follows_the_content_and_the_order_of_the_stores(fleets):
    joined = JoinedStores(fleets)
    assert joined.digest() == JoinedStores(fleets).digest() != JoinedStores(fleets[::-1]).digest()
    assert joined.digest() != JoinedStores(fleets[:1]).digest()


def test_an_epoch_sees_every_scene_once_with_both_rigs_in_a_batch(fleets):
    """Scenes are drawn in proportion to their number, without an option that a run would have to remember."""
    config = replace(tiny.upcycle_config(), unlabeled_batch=4)
    read = unlabeled_reader(METHODS["hybrid"], config, store=JoinedStores(fleets), scans=None)
    first, second = read(0), read(1)
    wanted = {store[i].scene_id for store in fleets for i in range(len(store))}
    assert {*first.ids, *second.ids} == wanted
    assert len(first.ids) + len(second.ids) == len(wanted)
    assert {len({*half.ids} & {fleets[0][i].scene_id for i in range(3)}) for half in (first, second)} == {1, 2}
    assert first.scenes.batch_size == 4


def test_one_store_is_drawn_as_without_joining(fleets):
    config = tiny.upcycle_config()
    alone, joined = (
        unlabeled_reader(METHODS["hybrid"], config, store=s, scans=None) for s in (fleets[1], JoinedStores(fleets[1:]))
    )
    for step in range(5):
        a, b = alone(step), joined(step)
        assert a.ids == b.ids
        assert torch.equal(a.scenes.voxels.features, b.scenes.voxels.features)


def test_a_batch_accepts_the_encoders_that_were_checked_and_no_other():
    """The list is what each store was compared with; a scene of a third encoder would be noise to the decoder."""
    mine, other, third = scene(0), scene(1, fingerprint=OTHER_ENCODER), scene(2, fingerprint="ef" * 32)
    batch = collate_scenes([mine, other], encoders=(ENCODER, OTHER_ENCODER))
    assert torch.equal(batch.scene(1).voxels.features, collate_scenes([other]).voxels.features)
    with pytest.raises(InvalidInput, match="do not mix in a batch: encoder fingerprint cdcdcdcd…, expected abababab"):
        collate_scenes([mine, other])
    for wrong in ([mine, third], [third, mine], [third]):
        with pytest.raises(InvalidInput, match="encoder fingerprint efefefef"):
            collate_scenes(wrong, encoders=(ENCODER, OTHER_ENCODER))
    with pytest.raises(InvalidInput, match="layer of the cut"):
        collate_scenes([mine, scene(1, spec=OTHER_SPEC)], encoders=(ENCODER,))


def test_a_store_that_is_given_twice_is_named(fleets, tmp_path):
    import shutil

    copy = shutil.copytree(fleets[0].folder, tmp_path / "copy")
    (tmp_path / "link").symlink_to(fleets[0].folder)
    with pytest.raises(InvalidInput, match=r"link is given twice"):
        JoinedStores([*fleets, SmashedStore(tmp_path / "link")])
    with pytest.raises(InvalidInput, match=r"a/store and .*copy hold the same 3 scenes, which would count double"):
        JoinedStores([*fleets, SmashedStore(copy)])


def test_an_empty_store_and_one_of_another_cut_are_named(fleets, tmp_path):
    with pytest.raises(InvalidInput, match=r"the store .*empty/store holds no scene"):
        JoinedStores([*fleets, filled(tmp_path / "empty", ())])
    with pytest.raises(InvalidInput, match=r"the scenes of .*cut/store were made at another cut than those of .*a/store"):
        JoinedStores([*fleets, filled(tmp_path / "cut", range(2), spec=OTHER_SPEC)])
    with pytest.raises(InvalidInput, match="at least one store"):
        JoinedStores([])


def test_a_damaged_shard_is_replaced_from_its_own_store_and_the_limit_is_that_of_the_store(fleets, monkeypatch):
    """A large store must not hide that a small one is broken, and a replacement keeps the shares of the fleets."""
    joined = JoinedStores(fleets)
    shard = sorted((fleets[0].folder / "shards").glob("*.tar"))[0]
    shard.write_bytes(b"x" * shard.stat().st_size)
    own = {fleets[0][i].scene_id for i in range(3) if fleets[0]._shards[fleets[0]._shard[i]] != shard.stem}
    with pytest.raises(BrokenStore, match=r"1 of 3 scenes of the store .*a/store are in damaged shards"):
        [joined.readable(i) for i in range(3)]
    monkeypatch.setattr(store_module, "LOST_SHARE", 0.5)
    joined = JoinedStores([SmashedStore(store.folder) for store in fleets])
    with pytest.warns(UserWarning, match="is damaged"):
        assert {joined.readable(i).scene_id for i in range(3)} == own

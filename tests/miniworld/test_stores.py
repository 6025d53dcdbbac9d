from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lavender.config import TeacherConfig
from lavender.errors import TargetError
from lavender.images import image_sha256
from lavender.miniworld.scenes import World, make_scenes
from lavender.miniworld.stores import agnostic_targets, exact_targets, shuffled_targets, target_maps, teacher_targets
from lavender.targets.store import TargetWriter

CONFIG = TeacherConfig(inversion="noise", timesteps=(151,), map_size=8)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    scenes = list(make_scenes(31, 8, world=World(pairs="common")))
    teacher = teacher_targets(folder, scenes, CONFIG, progress=False)
    return scenes, teacher, exact_targets(folder / "exact", scenes, 8), shuffled_targets(folder / "shuffled", teacher, 0)


def test_the_three_stores_differ_in_their_maps_alone(stores):
    scenes, *three = stores
    for store in three:
        targets = [store[sample_id] for sample_id in store]
        assert [target.image_sha256 for target in targets] == [image_sha256(scene.image) for scene in scenes]
        assert [target.word_maps.caption for target in targets] == [scene.caption for scene in scenes]
        assert {target.word_maps.maps.shape[1:] for target in targets} == {(8, 8)}
    assert len({store.fingerprint for store in three}) == 3


def test_exact_targets_are_the_share_that_objects_cover(stores):
    scenes, _, exact, _ = stores
    for scene, sample_id in zip(scenes, exact, strict=True):
        word_maps = exact[sample_id].word_maps
        referents = {(r.start, r.end): r for r in scene.referents}
        for word, values in zip(word_maps.words, word_maps.maps, strict=True):
            referent = referents.get((word.start, word.end))
            if referent is None:
                assert np.isnan(values).all()
            else:
                share = scene.masks[referent.object_index].reshape(8, 8, 8, 8).mean(axis=(1, 3))
                np.testing.assert_allclose(values, share, atol=1e-3)


def test_shuffled_targets_belong_to_other_pictures(stores):
    _, teacher, _, shuffled = stores
    owners = {}
    for sample_id, maps in zip(teacher, target_maps(teacher), strict=True):
        for values in maps.values():
            owners.setdefault(values.tobytes(), set()).add(sample_id)
    for sample_id in shuffled:
        for values in shuffled[sample_id].word_maps.maps:
            assert sample_id not in owners[values.tobytes()]


def test_stores_that_were_cut_off_end_the_same(stores, tmp_path, monkeypatch):
    scenes, teacher, exact, shuffled = stores
    add = TargetWriter.add

    def dies(writer, target):
        if len(writer.done) == 3:
            raise KeyboardInterrupt
        add(writer, target)

    with monkeypatch.context() as patched:
        patched.setattr(TargetWriter, "add", dies)
        for make, *given in ((exact_targets, "exact", scenes, 8), (shuffled_targets, "shuffled", teacher, 0)):
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path / given[0], *given[1:])
    again = exact_targets(tmp_path / "exact", scenes, 8)
    other = shuffled_targets(tmp_path / "other", teacher, 1)
    for one, two in ((exact, again), (shuffled, shuffled_targets(tmp_path / "shuffled", teacher, 0))):
        for first, second in zip(one, two, strict=True):
            np.testing.assert_array_equal(one[first].word_maps.maps, two[second].word_maps.maps)
    first = next(iter(teacher))
    assert not np.array_equal(other[first].word_maps.maps, shuffled[first].word_maps.maps)


def test_a_folder_of_other_targets_is_refused(stores, tmp_path):
    """By what decides about the maps: scenes, masks, seed, teacher."""
    scenes, teacher, exact, shuffled = stores
    moved = [replace(scenes[0], masks=scenes[0].masks[:, ::-1]), *scenes[1:]]
    for others in (scenes[:4], scenes[::-1], moved):
        with pytest.raises(TargetError, match="another teacher or config"):
            exact_targets(exact.folder, others, 8)
    for one, seed in ((teacher, 1), (exact, 0)):
        with pytest.raises(TargetError, match="another teacher or config"):
            shuffled_targets(shuffled.folder, one, seed)
    agnostic_targets(tmp_path / "agnostic", exact_targets(tmp_path / "few", scenes[:2], 8))
    with pytest.raises(TargetError, match="another teacher or config"):
        agnostic_targets(tmp_path / "agnostic", exact)
    assert exact_targets(exact.folder, scenes, 8).fingerprint == exact.fingerprint


def test_one_picture_has_no_other_to_shuffle_with(stores, tmp_path):
    one = exact_targets(tmp_path / "one", stores[0][:1], 8)
    with pytest.raises(TargetError, match="of one picture"):
        shuffled_targets(tmp_path / "shuffled", one, 0)

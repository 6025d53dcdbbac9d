from __future__ import annotations

import json

import numpy as np
import pytest

from lavender.config import AlignmentConfig, TeacherConfig, TrainingConfig
from lavender.miniworld.demo import run_demo
from lavender.miniworld.experiment import (
    ExperimentConfig,
    extract_targets,
    oracle_targets,
    shuffled_targets,
    target_maps,
    training_scenes,
)

CONFIG = ExperimentConfig(
    num_train=8,
    num_held_out=8,
    teacher=TeacherConfig(inversion="noise", timesteps=(151,)),
    alignment=AlignmentConfig(weight=0.3, rows="reads", aligner="identity"),
    training=TrainingConfig(steps=3, batch_size=4, learning_rate=1e-3),
)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    scenes = training_scenes(CONFIG)
    teacher = extract_targets(folder, scenes, CONFIG.teacher, progress=False)
    return scenes, teacher, oracle_targets(folder / "oracle", scenes, teacher), shuffled_targets(folder / "shuffled", teacher, 0)


def test_oracle_targets_are_the_exact_masks(stores):
    scenes, teacher, oracle, _ = stores
    assert list(oracle) == list(teacher)
    for scene, sample_id in zip(scenes, oracle, strict=True):
        maps = {
            (w.start, w.end): m for w, m in zip(oracle[sample_id].word_maps.words, oracle[sample_id].word_maps.maps, strict=True)
        }
        referents = {(r.start, r.end): r for r in scene.referents}
        for span, values in maps.items():
            if span in referents:
                small = scene.word_mask(referents[span]).reshape(32, 2, 32, 2).mean(axis=(1, 3))
                np.testing.assert_allclose(values, small, atol=1e-3)
            else:
                assert np.isnan(values).all()


def test_shuffled_targets_belong_to_other_pictures(stores):
    _, teacher, _, shuffled = stores
    owner = {m.tobytes(): sample_id for sample_id, maps in zip(teacher, target_maps(teacher), strict=True) for m in maps.values()}
    for sample_id in shuffled:
        for values in shuffled[sample_id].word_maps.maps:
            assert owner[values.tobytes()] != sample_id


def test_shuffling_is_reproducible_and_follows_the_seed(stores, tmp_path):
    _, teacher, _, shuffled = stores
    again, other = shuffled_targets(tmp_path / "a", teacher, 0), shuffled_targets(tmp_path / "b", teacher, 1)
    first = next(iter(teacher))
    np.testing.assert_array_equal(again[first].word_maps.maps, shuffled[first].word_maps.maps)
    assert not np.array_equal(other[first].word_maps.maps, shuffled[first].word_maps.maps)
    assert len({teacher.fingerprint, shuffled.fingerprint}) == 2


def test_the_demo_from_end_to_end(tmp_path, capsys):
    report = run_demo(tmp_path / "demo", CONFIG)
    results = json.loads((tmp_path / "demo/results.json").read_text())
    assert [arm["name"] for arm in results["arms"]] == ["before", "none", "teacher"]
    assert results["arms"][2]["aligner"]["best_constant_error"] > 0
    assert "Teacher" in capsys.readouterr().out
    html = report.read_text()
    assert html.count("<img") > 6 * 4 * 3
    # Again: every stage is found finished, and the figures are the same.
    run_demo(tmp_path / "demo", CONFIG)
    again = json.loads((tmp_path / "demo/results.json").read_text())
    assert {k: v for k, v in again.items() if k != "duration_s"} == {k: v for k, v in results.items() if k != "duration_s"}

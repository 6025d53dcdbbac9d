"""`best:K` in a run: chosen once, written down, and the same for every stage and whoever continues."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import lavender
from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig, TrainingConfig, WordsConfig, from_dict, to_dict
from lavender.data.samples import Conversation, Message, Sample
from lavender.errors import ConfigError, DataError, ModelError, TargetError
from lavender.miniworld.scenes import DESCRIBE
from lavender.training import train
from lavender.training.train import fine_tune, load_aligner, load_student

from .test_train import write_targets

pytestmark = pytest.mark.usefixtures("no_pictures")
TRAINING = TrainingConfig(steps=2, batch_size=4, learning_rate=1e-3, save_steps=1)
BEST = AlignmentConfig(aligner="light", heads="best:3", layers="best:2", rows="both", weight=10.0, question_rows=None)


@pytest.fixture
def samples(scenes):
    return [Sample(str(i), s.image, DESCRIBE, s.caption) for i, s in enumerate(scenes[:6])]


@pytest.fixture
def targets(scenes, tmp_path):
    return write_targets(tmp_path / "targets", scenes[:6], [str(i) for i in range(6)])


@pytest.fixture
def scorings(monkeypatch):
    """The configs that scores were made for."""
    scorings = []

    def counted(model, config, batches):
        scorings.append(config)
        return lavender.choose_heads(model, config, batches)

    monkeypatch.setattr(train, "choose_heads", counted)
    return scorings


def test_a_run_chooses_once_and_says_what(student_folder, processor, samples, targets, tmp_path, scorings):
    out = tmp_path / "run"
    training = replace(TRAINING, aligner_steps=1)
    trained = fine_tune(student_folder, samples, out, training, targets=targets, alignment=BEST, progress=False)
    assert scorings == [BEST]
    student = load_student(student_folder)[0]
    collator = Collator(processor, targets)
    expected = lavender.choose_heads(student, BEST, [collator(samples[:4]), collator(samples[4:])])
    written = json.loads((out / "heads.json").read_text())
    assert written == {"asked": to_dict(BEST), **expected.to_dict()}
    for folder in (out, out / "first_stage"):
        assert json.loads((folder / "run.json").read_text())["alignment"] == to_dict(expected.config)
    assert trained.get_base_model()._lavender_patch.config == expected.config
    trained.get_base_model()._lavender_patch.unpatch()
    # The aligner belongs to the settings of run.json.
    alignment = from_dict(AlignmentConfig, json.loads((out / "run.json").read_text())["alignment"])
    handle = lavender.patch(student, alignment)
    load_aligner(handle, out)
    handle.unpatch()
    with pytest.raises(ModelError, match=rf"has the heads {alignment.heads} for channels.*heads='{alignment.heads}'"):
        load_aligner(lavender.patch(student, replace(alignment, heads="3.0,3.1,3.2", layers=())), out)
    # A finished run is loaded, a killed one goes on, by the choice that it was begun with.
    fine_tune(student_folder, samples, out, training, targets=targets, alignment=BEST, progress=False)
    before = json.loads((out / "history.json").read_text())
    (out / "history.json").unlink()
    fine_tune(student_folder, samples, out, training, targets=targets, alignment=BEST, progress=False)
    assert json.loads((out / "history.json").read_text()) == before
    assert scorings == [BEST]
    other = replace(BEST, heads="best:2")
    with pytest.raises(TargetError, match=r"another alignment.*heads\.json"):
        fine_tune(student_folder, samples, out, training, targets=targets, alignment=other, progress=False)
    (out / "heads.json").write_text("{")
    with pytest.raises(DataError, match=r"heads\.json is damaged"):
        fine_tune(student_folder, samples, out, training, targets=targets, alignment=BEST, progress=False)
    # So is the same run by the chosen settings themselves.
    fine_tune(student_folder, samples, out, training, targets=targets, alignment=expected.config, progress=False)


def test_a_choice_that_cannot_be_made_ends_the_run_before_it_starts(student_folder, samples, targets, tmp_path):
    alignment = AlignmentConfig(heads="best:99", weight=10.0, aligner="sim", question_rows=None)
    with pytest.raises(ConfigError, match="best:99"):
        fine_tune(student_folder, samples, tmp_path / "run", TRAINING, targets=targets, alignment=alignment, progress=False)
    assert not (tmp_path / "run/run.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        fine_tune(student_folder, samples, tmp_path / "file", TRAINING, targets=targets, alignment=replace(BEST), progress=False)


def test_a_run_that_an_older_version_began_goes_on(student_folder, samples, targets, tmp_path):
    """It knows no heads, no roles and no end."""
    out, alignment = tmp_path / "run", AlignmentConfig(layers=(1, 3), rows="reads")
    fine_tune(student_folder, samples, out, TRAINING, targets=targets, alignment=alignment, progress=False)
    record = json.loads((out / "run.json").read_text())
    for name in ("heads", "question_rows", "question_layers", "question_heads", "until"):
        del record["alignment"][name]
    del record["words"]["roles"]
    (out / "run.json").write_text(json.dumps(record))
    (out / "history.json").unlink()
    fine_tune(student_folder, samples, out, TRAINING, targets=targets, alignment=alignment, progress=False)
    assert len(json.loads((out / "history.json").read_text())) == 2
    (out / "run.json").write_text(json.dumps(record))
    other = replace(alignment, heads="1.0")
    with pytest.raises(TargetError, match="another alignment"):
        fine_tune(student_folder, samples, out, TRAINING, targets=targets, alignment=other, progress=False)


@pytest.mark.parametrize("aligner", ["identity", pytest.param("light", marks=pytest.mark.full)])
def test_an_alignment_that_ended_continues_as_ended(student_folder, samples, targets, tmp_path, aligner):
    """Killed after its end, and before it."""
    alignment = AlignmentConfig(aligner=aligner, until=0.5, weight=10.0, question_rows=None)
    training = replace(TRAINING, steps=4, arguments={"save_total_limit": 4})
    histories = []
    for kept in (4, 3, 1):
        out = tmp_path / "run"
        if kept < 4:
            (out / "history.json").unlink()
            for step in range(kept + 1, 5):
                for path in sorted((out / f"checkpoints/checkpoint-{step}").rglob("*"), reverse=True):
                    path.unlink() if path.is_file() else path.rmdir()
                (out / f"checkpoints/checkpoint-{step}").rmdir()
        fine_tune(student_folder, samples, out, training, targets=targets, alignment=alignment, progress=False)
        histories.append(json.loads((out / "history.json").read_text()))
    assert [entry["alignment_weight"] for entry in histories[0]] == [10, 10, 0, 0]
    assert histories[1] == histories[0]
    assert histories[2] == histories[0]


def test_adapters_are_scored_with_what_they_changed(student_folder, samples, targets, tmp_path, scorings):
    first = tmp_path / "plain"
    fine_tune(student_folder, samples, first, replace(TRAINING, learning_rate=1.0), progress=False)
    found = []
    for name, adapter in (("one", None), ("two", first / "adapter")):
        alignment = AlignmentConfig(aligner="identity", heads="best:3", weight=10.0, question_rows=None)
        fine_tune(
            student_folder,
            samples,
            tmp_path / name,
            TRAINING,
            targets=targets,
            alignment=alignment,
            adapter=adapter,
            progress=False,
        )
        found.append(torch.tensor(json.loads((tmp_path / name / "heads.json").read_text())["scores"]["answer"]["heads"]))
    assert not torch.allclose(*found)


def test_words_of_questions_have_heads_of_their_own(student_folder, scenes, targets, tmp_path):
    asked = [Sample(str(i), s.image, f"is this right ? {s.caption}", s.caption) for i, s in enumerate(scenes[:6])]
    alignment = AlignmentConfig(aligner="light", heads="best:2", question_rows="reads", weight=10.0)
    words = WordsConfig(roles=("question", "answer"))
    fine_tune(student_folder, asked, tmp_path / "run", TRAINING, targets=targets, alignment=alignment, words=words, progress=False)
    written = json.loads((tmp_path / "run/heads.json").read_text())
    assert written["scores"]["question"]["num_words"] == written["scores"]["answer"]["num_words"] > 10
    for role, name in (("answer", "heads"), ("question", "question_heads")):
        scores = torch.tensor(written["scores"][role]["heads"]).flatten()
        best = sorted(scores.argsort(descending=True)[:2].tolist())
        assert written["config"][name] == ",".join(f"{n // 4}.{n % 4}" for n in best)
    history = json.loads((tmp_path / "run/history.json").read_text())
    assert all(entry["matched_words"] > 0 for entry in history)


@pytest.mark.parametrize(
    ("changes", "other", "match"),
    [
        ({"aggregation": "learned", "layers": (1, 3)}, {"layers": (3, 1)}, r"has the layers \(1, 3\).*layers=\(1, 3\)"),
        ({"aggregation": "learned", "heads": "0.1,2.3"}, {"heads": "2.3,0.1"}, r"has the heads 0\.1,2\.3 .*heads='0\.1,2\.3'"),
        (
            {"aggregation": "learned", "question_layers": (0, 1)},
            {"question_layers": (0, 2)},
            r"question_layers=\(0, 1\)",
        ),
        ({"aggregation": "parallel", "layers": (1, 3)}, {"layers": (1, 2)}, r"has the layers \(1, 3\)"),
        ({"aggregation": "parallel", "layers": (1,)}, {"layers": ()}, r"has the layers \(1,\), and this alignment \(\)"),
    ],
)
def test_an_aligner_goes_to_the_layers_and_heads_it_is_of(student, tmp_path, changes, other, match):
    alignment = AlignmentConfig(**changes)
    with lavender.patch(student, alignment) as handle:
        for parameter in handle.model.lavender.parameters():
            parameter.data.fill_(0.25)
        save_file(handle.model.lavender.state_dict(), tmp_path / "aligner.safetensors")
    (tmp_path / "run.json").write_text(json.dumps({"alignment": to_dict(alignment)}))
    with lavender.patch(student, replace(alignment, weight=2.0, rows="reads")) as handle:
        load_aligner(handle, tmp_path)
        assert all((parameter == 0.25).all() for parameter in handle.model.lavender.parameters())
    with lavender.patch(student, replace(alignment, **other)) as handle, pytest.raises(ModelError, match=match):
        load_aligner(handle, tmp_path)


def test_all_layers_are_all_layers_however_said(student, tmp_path):
    with lavender.patch(student, AlignmentConfig(aggregation="parallel", layers=(0, 1, 2, 3))) as handle:
        save_file(handle.model.lavender.state_dict(), tmp_path / "aligner.safetensors")
        (tmp_path / "run.json").write_text(json.dumps({"alignment": to_dict(handle.config)}))
    with lavender.patch(student, AlignmentConfig(aggregation="parallel")) as handle:
        load_aligner(handle, tmp_path)


def test_heads_of_a_run_that_was_never_begun_go(student_folder, samples, targets, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train, "_train", dies)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(student_folder, samples, out, TRAINING, targets=targets, alignment=BEST, progress=False)
        assert (out / "heads.json").exists()
        with pytest.raises(KeyboardInterrupt):
            fine_tune(
                student_folder, samples, out, TRAINING, targets=targets, alignment=AlignmentConfig(heads="1.0"), progress=False
            )
    assert json.loads((out / "run.json").read_text())["alignment"]["heads"] == "1.0"
    assert not (out / "heads.json").exists()


def test_an_older_run_goes_on_only_with_the_words_it_had(student_folder, scenes, samples, targets, tmp_path):
    """It compared one answer, and found targets by id alone."""
    again = Conversation(
        "0", (scenes[0].image,), tuple(Message(*each) for each in (("user", "<image>What?"), ("assistant", "One."))) * 2
    )
    one_answer = replace(again, messages=again.messages[:2])
    unknown = replace(samples[0], id="another")
    for name, first, match in (
        ("several", again, "sample '0' has several answers"),
        ("found", unknown, "sample 'another' has targets by its picture"),
        ("same", one_answer, None),
    ):
        out, data = tmp_path / name, [first, *samples[1:]]
        alignment, words = AlignmentConfig(), WordsConfig()
        training = replace(TRAINING, steps=1)

        def run(out=out, data=data, alignment=alignment, words=words, training=training):
            fine_tune(student_folder, data, out, training, targets=targets, alignment=alignment, words=words, progress=False)

        run()
        record = json.loads((out / "run.json").read_text())
        del record["words"]["roles"]
        (out / "run.json").write_text(json.dumps(record))
        run()  # finished, it is loaded
        (out / "history.json").unlink()
        if match is None:
            run()
        else:
            with pytest.raises(TargetError, match=rf"older version began, and {match}.*give a new folder"):
                run()


def test_settings_of_questions_without_any_are_named(student_folder, samples, targets, tmp_path, caplog):
    for words, count in ((WordsConfig(roles=("question", "answer")), 0), (None, 1)):
        alignment = AlignmentConfig(question_layers=(1,))
        training = replace(TRAINING, steps=1)
        fine_tune(
            student_folder,
            samples,
            tmp_path / str(count),
            training,
            targets=targets,
            alignment=alignment,
            words=words,
            progress=False,
        )
        assert caplog.text.count("question_layers=(1,): no word that the user says is compared") == count

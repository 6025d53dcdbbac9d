"""The doctor reads headers: what of a model's files is missing, cut off or none is named, and nothing is loaded or run."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lavender.cli import main
from lavender.doctor import examine
from lavender.errors import ModelError
from lavender.pretrained.headers import TRANSFORMERS, loading_report, read_shapes

MODEL = "model.safetensors"


class Canary:
    """A pickle that leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def folder(student_folder, tmp_path):
    return shutil.copytree(student_folder, tmp_path / "student")


@pytest.fixture
def doctor(monkeypatch, capsys):
    """The command: its exit code, what it reports by topic, and its line on standard error."""

    def run(model) -> tuple[int, dict[str, str], str]:
        monkeypatch.setattr(sys, "argv", ["lavender", "doctor", str(model)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        err = "".join(line for line in re.split("[\r\n]+", err) if "it/s]" not in line)  # bars of the libraries
        assert err.count("lavender: ") <= 1
        lines = [re.split(" {2,}", line, maxsplit=1) for line in out.splitlines() if line and line[0] != " "]
        return end.value.code or 0, {line[0]: line[-1] for line in lines}, err

    return run


def sharded(folder: Path, lost: str = "") -> dict[str, str]:
    """Makes two shards and their index of a student's weights, of which one lacks a tensor; returns the index."""
    weights = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    names = sorted(weights)
    places = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in part if name != lost}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / f"{MODEL}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def as_bin(folder: Path, **options) -> Path:
    weights = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    torch.save(weights, folder / "pytorch_model.bin", **options)
    return folder / "pytorch_model.bin"


def test_a_sound_model_in_every_form(folder, doctor, tmp_path):
    count = len(load_file(folder / MODEL))
    whole = f"{count} tensors, of the names and shapes that the model has"
    for name, change in (("one file", lambda f: None), ("shards", sharded), ("a .bin", as_bin)):
        copy = shutil.copytree(folder, tmp_path / name)
        change(copy)
        code, report, err = doctor(copy)
        assert (code, report["weights"], err) == (0, whole, ""), name
    copy = shutil.copytree(folder, tmp_path / "old")
    as_bin(copy, _use_new_zipfile_serialization=False)
    assert doctor(copy)[1]["weights"].startswith("not examined: no header")


@pytest.mark.parametrize("cut", [0, 4, 1000, -1])
def test_a_truncated_file_is_named(folder, doctor, cut):
    content = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(content[:cut])
    code, report, err = doctor(folder)
    assert code == 2
    assert err.startswith(f"lavender: {MODEL} of the student {str(folder)!r} is damaged (")
    assert MODEL in report["weights"]
    assert "text tower" in report  # the rest of the report is there


@pytest.mark.parametrize("cut", [0, 4, 1000, -1])
def test_a_truncated_bin_is_named(folder, doctor, cut):
    path = as_bin(folder)
    path.write_bytes(path.read_bytes()[:cut])
    code, _, err = doctor(folder)
    assert code == 2
    assert err.startswith("lavender: pytorch_model.bin of the student ")


def test_shards_are_whole_and_have_what_their_index_lists(folder, doctor, tmp_path):
    places = sharded(folder)
    second = "model-00002-of-00002.safetensors"
    copy = shutil.copytree(folder, tmp_path / "cut")
    (copy / second).write_bytes((copy / second).read_bytes()[:-10])
    code, _, err = doctor(copy)
    assert (code, err.startswith(f"lavender: {second} of the student")) == (2, True)
    (copy / second).unlink()
    code, _, err = doctor(copy)
    assert code == 2
    assert f"1 of 2 files of weights are missing in {copy} ({second})" in err
    lost = next(name for name, place in places.items() if place == second)
    copy = shutil.copytree(folder, tmp_path / "lost")
    weights = load_file(copy / second)
    del weights[lost]
    save_file(weights, copy / second, metadata={"format": "pt"})
    code, _, err = doctor(copy)
    assert code == 2
    assert f"{second} of the student" in err
    assert f"it lacks 1 tensors that its index lists, {lost}" in err
    for content in ("{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "../b.safetensors"}}'):
        (copy / f"{MODEL}.index.json").write_text(content)
        code, _, err = doctor(copy)
        assert (code, f"{MODEL}.index.json of the student" in err) == (2, True), content


def test_what_is_no_file_of_weights_is_named_and_nothing_is_run(folder, doctor, tmp_path):
    (folder / MODEL).unlink()
    canary = tmp_path / "canary"
    for name, make in (
        (MODEL, lambda path: path.mkdir()),
        (MODEL, os.mkfifo),
        (MODEL, lambda path: path.symlink_to("nowhere")),
        (MODEL, lambda path: path.write_bytes(b"\xff" * 5000)),
        ("pytorch_model.bin", lambda path: torch.save({"a": Canary(canary)}, path)),
        ("pytorch_model.bin", lambda path: torch.save([1, 2], path)),
        ("pytorch_model.bin", lambda path: path.write_text("<html>")),
    ):
        make(folder / name)
        code, _, err = doctor(folder)
        says = f"lavender: {folder / name} is a pipe" if make is os.mkfifo else f"lavender: {name} of the student"
        assert (code, err.startswith(says)) == (2, True), err
        (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
    assert not canary.exists()
    code, report, err = doctor(folder)  # of no file at all
    assert (code, err) == (1, "")
    assert report["weights"] == f"not examined: there is no model.safetensors and no pytorch_model.bin in {folder}"


def test_shapes_that_are_not_the_configs_are_named(folder, doctor):
    config = json.loads((folder / "config.json").read_text())
    for part, key, change in (
        ("text_config", "vocab_size", 8),
        ("text_config", "hidden_size", 64),
        ("vision_config", "hidden_size", 32),
    ):
        changed = json.loads(json.dumps(config))
        changed[part][key] += change
        (folder / "config.json").write_text(json.dumps(changed))
        code, report, err = doctor(folder)
        assert (code, err) == (1, ""), (key, report)
        assert "have another shape than its config says" in report["weights"]


def test_an_image_token_outside_of_the_vocabulary(folder, doctor, student, processor):
    config = json.loads((folder / "config.json").read_text())
    rows = config["text_config"]["vocab_size"]
    [key] = [key for key in config if key.startswith("image_token_i")]
    assert doctor(folder)[1]["image token"] == str(config[key])
    for token in (rows, rows + 7, -1):
        (folder / "config.json").write_text(json.dumps(config | {key: token}))
        code, report, err = doctor(folder)
        assert (code, err) == (1, "")
        assert report["image token"] != str(token)
    student.config.image_token_id = rows  # loaded, and without a processor
    [finding] = [finding for finding in examine(student) if finding.topic == "image token"]
    assert f"outside of the model's vocabulary of {rows} tokens" in finding.result
    assert finding.remedy
    (folder / "config.json").write_text(json.dumps(config | {key: rows}))
    (folder / "processor_config.json").unlink()
    assert {finding.topic for finding in examine(folder) if finding.remedy} >= {"processor", "image token"}


def test_a_tokenizer_of_another_model(folder, doctor):
    """With more words than the model has vectors for, as after an `add_tokens` without `resize_token_embeddings`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{n}>" for n in range(2000)])
    tokenizer.save_pretrained(folder)
    code, report, _ = doctor(folder)
    assert code == 1
    assert "the tokenizer has ids up to" in report["vocabulary"]


# Configs


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"])
def test_configs_of_wrong_types_are_one_line(folder, file):
    """Every entry of the first two levels, a few wrong values each: findings, or one line."""
    if not (folder / file).is_file():
        pytest.skip("the student has no such file")
    text = (folder / file).read_text()
    places = [(key,) for key in json.loads(text)]
    places += [(key, inner) for (key,) in places if isinstance(json.loads(text)[key], dict) for inner in json.loads(text)[key]]
    values = ["abc", -1, None, [], {"a": 1}, 1.5]
    for number, place in enumerate(places):
        config = json.loads(text)
        part = config
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = values[number % len(values)]
        (folder / file).write_text(json.dumps(config))
        _require_one_line(folder)
    for content in ("[]", "null", "{", "", "\0", "[" * 5000):
        (folder / file).write_text(content)
        _require_one_line(folder)


def _require_one_line(model: Path) -> None:
    said = ""
    try:
        findings = examine(model)
    except ModelError as error:
        said = str(error)
    assert "\n" not in said
    assert said or findings


# Pipelines


PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def pipeline(teacher_folder, tmp_path):
    return shutil.copytree(teacher_folder, tmp_path / "pipeline")


def test_the_weights_of_a_pipelines_parts(pipeline, doctor, tmp_path):
    code, report, err = doctor(pipeline)
    assert (code, err) == (0, "")
    assert report["parts"].startswith("vae AutoencoderKL, text_encoder CLIPTextModel, tokenizer CLIPTokenizer, unet ")
    for part, stem in PARTS.items():
        copy = shutil.copytree(pipeline, tmp_path / part)
        path = copy / part / f"{stem}.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-100])
        code, _, err = doctor(copy)
        assert code == 2
        assert err.startswith(f"lavender: {path.name} of the {part} of {str(copy)!r} is damaged (")
        path.write_bytes(content)
        weights = load_file(path)
        name = sorted(weights)[-1]
        save_file({key: value for key, value in weights.items() if key != name}, path, metadata={"format": "pt"})
        code, report, err = doctor(copy)
        assert (code, err) == (1, "")
        assert report["weights"].startswith(f"the {part} of {str(copy)!r} lacks 1 of ")
        save_file(weights | {name: torch.zeros(3, 5, 2)}, path, metadata={"format": "pt"})
        assert "[3, 5, 2] in the file" in doctor(copy)[1]["weights"]
        path.unlink()
        torch.save(weights, path.with_name("diffusion_pytorch_model.bin" if stem != "model" else "pytorch_model.bin"))
        assert doctor(copy)[0] == 0
        path.with_name("diffusion_pytorch_model.bin" if stem != "model" else "pytorch_model.bin").unlink()
        code, report, err = doctor(copy)
        assert (code, err) == (1, "")
        assert f"the {part} of {str(copy)!r} has no {path.name}" in report["weights"]


@pytest.mark.parametrize("part", ["vae", "tokenizer", "text_encoder", "scheduler"])
def test_a_part_that_is_missing(part, pipeline, doctor):
    """Its folder, its line in the index, or its class; extract says the same."""
    from lavender.teachers.loading import load_pipeline

    index = json.loads((pipeline / "model_index.json").read_text())
    for entry, message in (
        ([None, None], f"lists no {part}, of which a StableDiffusionPipeline is made"),
        (None, f"lists no {part}, of which a StableDiffusionPipeline is made"),
        (["diffusers", "NoSuchClass"], f"its {part} is a NoSuchClass of diffusers, which neither"),
        (["nowhere", index[part][1]], f"its {part} is a {index[part][1]} of nowhere, which neither"),
        (index[part], part),
    ):
        if entry == index[part]:
            shutil.rmtree(pipeline / part)
        changed = {key: value for key, value in index.items() if key != part} | ({} if entry is None else {part: entry})
        (pipeline / "model_index.json").write_text(json.dumps(changed))
        code, report, err = doctor(pipeline)
        assert (code, err) == (1, ""), entry
        assert message in report["extraction"]
        with pytest.raises(ModelError, match=message.split(",")[0]):
            load_pipeline(pipeline)


def test_a_loaded_pipeline_without_a_part(pipe):
    assert not [finding for finding in examine(pipe) if finding.remedy]
    pipe.vae = None
    [finding] = [finding for finding in examine(pipe) if finding.remedy]
    assert (finding.topic, finding.result) == ("extraction", "none: it has no vae")


def test_a_tokenizer_that_does_not_fit_the_text_encoder(pipeline, doctor):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    tokenizer.add_tokens([f"<extra{n}>" for n in range(50)])
    tokenizer.save_pretrained(pipeline / "tokenizer")
    code, report, _ = doctor(pipeline)
    assert code == 1
    assert report["tokenizer"].startswith("it has ids up to ")
    for file in ("vocab.json", "merges.txt", "tokenizer.json"):
        (pipeline / "tokenizer" / file).unlink(missing_ok=True)
    assert "has no tokenizer.json (or vocab.json and merges.txt)" in doctor(pipeline)[1]["extraction"]


@pytest.mark.full
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_pipelines_configs_of_wrong_types_are_one_line(file, pipeline):
    text = (pipeline / file).read_text()
    values = ["abc", -1, None, [], {"a": 1}, 1.5]
    for number, key in enumerate(json.loads(text)):
        (pipeline / file).write_text(json.dumps(json.loads(text) | {key: values[number % len(values)]}))
        _require_one_line(pipeline)
    for content in ("[]", "null", "{", "", "\0", "[" * 5000):
        (pipeline / file).write_text(content)
        _require_one_line(pipeline)


# Adapters


@pytest.fixture
def adapter(student, student_folder, tmp_path):
    model = get_peft_model(student, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(student_folder)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_that_does_not_fit_its_base(adapter, doctor, folder):
    assert doctor(adapter)[0] == 0
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != name}, path)
    code, report, err = doctor(adapter)
    assert (code, err) == (1, "")
    assert report["fit"] == f"it lacks 1 of {len(weights)} tensors ({name})"
    save_file(weights | {name: torch.zeros(4, 7)}, path)
    code, report, _ = doctor(adapter)
    assert code == 1
    assert f"1 tensors have other shapes ({name}: [4, 7] in the file, " in report["fit"]
    save_file(weights, path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for changes in ({"target_modules": ["no_such_module"]}, {"r": "abc"}, {"target_modules": "("}):
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
        code, report, err = doctor(adapter)
        assert (code, err) == (1, ""), changes
        assert report["fit"].startswith("cannot load a LoRA adapter"), changes
    for name, value in (("target_modules", 5), ("base_model_name_or_path", 5)):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {name: value}))
        code, _, err = doctor(adapter)
        assert (code, f"says {name} 5, expected" in err) == (2, True)
    for base in (None, "", "\0", str(adapter), str(folder / "nowhere")):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        assert doctor(adapter)[0] == 1, base


def test_a_truncated_adapter_is_named(adapter, doctor):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, report, err = doctor(adapter)
    assert code == 2
    assert err.startswith(f"lavender: adapter_model.safetensors of the adapter {str(adapter)!r} is damaged (")
    assert "fit" not in report


# Headers


def test_headers_are_what_the_file_holds_and_the_report_is_the_librarys(student_folder, teacher_folder):
    """Against transformers' and diffusers' own loading."""
    from diffusers import UNet2DConditionModel

    shapes = read_shapes(student_folder, TRANSFORMERS, "it")
    assert {name: value.shape for name, value in shapes.items()} == {
        name: value.shape for name, value in load_file(student_folder / MODEL).items()
    }
    assert all(value.is_meta for value in shapes.values())
    weights = load_file(teacher_folder / "unet/diffusion_pytorch_model.safetensors")
    first, *_, last = sorted(weights)
    changed = {("own" if name == first else name): torch.zeros(3) if name == last else value for name, value in weights.items()}
    unet, expected = UNet2DConditionModel.from_pretrained(
        teacher_folder, subfolder="unet", output_loading_info=True, ignore_mismatched_sizes=True
    )
    report = loading_report(unet, {name: value.to("meta") for name, value in changed.items()})
    assert (set(report["missing_keys"]), set(report["unexpected_keys"])) == ({first}, {"own"})
    assert [entry[0] for entry in report["mismatched_keys"]] == [last]
    assert not expected["missing_keys"]

"""`lavender doctor` says what it finds, and what is missing."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lavender
from lavender.cli import app
from lavender.config import Inversion, TeacherConfig
from lavender.data.samples import Pair
from lavender.doctor import examine, examine_machine
from lavender.errors import ConfigError, ModelError
from lavender.extraction.extract import extract
from lavender.kernels import dispatch
from lavender.kernels.cuda import driver as cuda
from lavender.kernels.cuda import nvrtc
from lavender.students.families import STUDENTS

from .students.zoo import built, families, sampled
from .teachers.pipeline_zoo import MORE_TEACHERS, PIPELINES


def results(model) -> dict[str, str]:
    return {finding.topic: finding.result for finding in examine(model)}


def remedies(model) -> dict[str, str]:
    return {finding.topic: finding.remedy for finding in examine(model) if finding.remedy}


def test_a_students_folder(student_folder):
    report = results(student_folder)
    assert report["model"] == "LlavaForConditionalGeneration (model type llava), a student"
    assert report["text tower"] == "LlamaModel at model.language_model"
    assert report["attention layers"].startswith("4 (4 x LlamaAttention)")
    assert report["base attention"].startswith("sdpa")
    assert report["grid rule"].startswith("square")
    assert report["processor"] == "LlavaProcessor"
    assert "heads of 32 in float32" in report["kernels"]
    assert not remedies(student_folder)


def test_a_teachers_folder(teacher_folder):
    report = results(teacher_folder)
    assert report["model"].startswith("StableDiffusionPipeline with UNet2DConditionModel")
    assert report["layout"] == "cross-attention to text alone"
    assert report["attention layers"].startswith("7, ")
    assert report["words"] == "tokenizer"


@pytest.mark.parametrize("name", sampled(families()))
def test_every_family_is_healthy(name):
    student = built(name)
    report = results(student.model)
    assert "attention layers" in report
    if name not in ("flamingo",):
        assert "unknown" not in report["grid rule"]
    assert not remedies(student.model)


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusionXLPipeline"])
def test_pipelines(name, tmp_path):
    pipe = PIPELINES[name]()
    pipe.save_pretrained(tmp_path)
    assert results(pipe) == results(tmp_path)
    order = {"FluxPipeline": "text first", "StableDiffusion3Pipeline": "image first"}.get(name, "cross-attention")
    assert order in results(pipe)["layout"]


def test_what_is_missing_has_a_remedy(student, student_folder, tmp_path):
    registered = STUDENTS.pop("llava")
    try:
        assert "register_family" in remedies(student)["grid rule"]
    finally:
        STUDENTS["llava"] = registered
    student.model.language_model.config._attn_implementation = "paged|eager"
    assert "set_attn_implementation('sdpa')" in remedies(student)["base attention"]
    with pytest.raises(ModelError, match="give a folder"):
        examine(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableAudioPipeline"}))
    with pytest.raises(ModelError, match="StableAudioPipeline"):
        examine(tmp_path)
    with pytest.raises(ModelError, match="cannot patch a object"):
        examine(object())
    assert "attention" in remedies(torch.nn.Linear(2, 2))


def test_the_command_prints_and_exits_by_what_is_missing(student_folder, tmp_path):
    result = CliRunner().invoke(app, ["doctor", str(student_folder)])
    assert result.exit_code == 0
    assert "grid rule" in result.output
    config = json.loads((student_folder / "config.json").read_text())
    assert config["model_type"] == "llava"
    registered = STUDENTS.pop("llava")
    try:
        result = CliRunner().invoke(app, ["doctor", str(student_folder)])
        assert result.exit_code == 1
        assert "->" in result.output
    finally:
        STUDENTS["llava"] = registered


def test_damaged_folders_are_one_clear_line(teacher_folder, tmp_path):
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(teacher_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match=r"model_index\.json .* cannot be read"):
        examine(folder)
    for wrong in ([], {}, {**index, "_class_name": ["A"]}, {**index, "unet": None}, {**index, "unet": ["mine", "OwnUNet"]}):
        (folder / "model_index.json").write_text(json.dumps(wrong))
        with pytest.raises(ModelError, match="expected a text-to-image pipeline"):
            examine(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "unet")
    with pytest.raises(ModelError, match=r"the unet of .* cannot be built"):
        examine(folder)


def test_attention_slicing_is_seen_before_anything_runs():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    assert not remedies(pipe)
    pipe.enable_attention_slicing()
    assert "disable_attention_slicing" in remedies(pipe)["attention processors"]
    pipe.disable_attention_slicing()
    assert not remedies(pipe)


def test_a_language_model_is_no_student():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert "image-text-to-text" in remedies(LlamaForCausalLM(config))["picture"]


# What lies at a path


def test_an_adapter_and_its_base(student, student_folder, tmp_path):
    """A run's own, an adapter with the aligner in it, and one whose base is away."""
    from lavender.config import AlignmentConfig
    from lavender.patching import patch

    folder, name = tmp_path / "run/adapter", "adapter_config.json"
    patch(student, AlignmentConfig(weight=10.0, aligner="sim"))
    aligner = len(list(student.lavender.parameters()))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["lavender"])
    model = get_peft_model(student, config)
    model.peft_config["default"].base_model_name_or_path = str(student_folder)
    model.save_pretrained(folder)
    report = results(folder)
    assert report["model"] == "LlavaForConditionalGeneration (model type llava), a student"  # the base, which comes last
    assert examine(folder)[0].result == "an adapter of PEFT (LORA), for a student"
    assert (report["rank"], report["modules"]) == ("4, alpha 8", "q_proj, v_proj")
    assert report["aligner"].startswith(f"in it, {aligner} tensors beside ")
    assert report["base model"] == f"{student_folder}, as follows"
    assert report.items() >= results(student_folder).items()
    assert not remedies(folder)
    saved = json.loads((folder / name).read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key: value for key, value in weights.items() if "lavender" not in key}, folder / "adapter_model.safetensors")
    assert set(remedies(folder)) == {"aligner"}
    (folder / name).write_text(json.dumps(saved | {"modules_to_save": None}))
    assert results(folder)["aligner"] == "not in it"
    (folder.parent / "aligner.safetensors").touch()
    assert results(folder)["aligner"] == f"beside it, {folder.parent / 'aligner.safetensors'}"
    (folder / name).write_text(json.dumps(saved | {"base_model_name_or_path": "org/away", "modules_to_save": None}))
    assert "org/away: cannot load an image-text-to-text model from 'org/away'" in results(folder)["base model"]
    assert set(remedies(folder)) == {"base model"}
    result = CliRunner().invoke(app, ["doctor", str(folder)])
    assert result.exit_code == 1
    for content in ("{", "[]", "{}"):
        (folder / name).write_text(content)
        with pytest.raises(ModelError, match=r"adapter_config\.json of .* cannot be read"):
            examine(folder)


def test_a_folder_in_another_format_is_no_sound_student(tmp_path):
    """Florence-2 as it was published: transformers knows its model type, and none of its weights."""
    built("florence2").model.save_pretrained(tmp_path)
    assert "weights" not in remedies(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"AutoConfig": "configuration_florence2.Florence2Config", "AutoModelForCausalLM": "modeling_florence2.Florence2"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    weights = load_file(tmp_path / "model.safetensors")
    published = {
        name.replace("model.vision_tower", "vision_tower.blocks").replace(".conv.", ".fn."): w for name, w in weights.items()
    }
    save_file(published, tmp_path / "model.safetensors", metadata={"format": "pt"})
    report = results(tmp_path)
    assert "that a Florence2ForConditionalGeneration does not know" in report["weights"]
    assert "not run" in report["own code"]
    assert "weights" in remedies(tmp_path)


def test_a_students_weights_are_compared_by_name_and_shape(student_folder, tmp_path):
    count = len(load_file(student_folder / "model.safetensors"))
    assert results(student_folder)["weights"] == f"{count} tensors, of the names and shapes that the model has"
    folder = shutil.copytree(student_folder, tmp_path / "student")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:1000])
    assert "weights" in remedies(folder)
    (folder / "model.safetensors").unlink()
    assert results(folder)["weights"].startswith("not examined")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in results(folder)["weights"]
    assert "weights" in remedies(folder)


# What extract takes


@pytest.mark.parametrize("name", sampled([*PIPELINES, *MORE_TEACHERS]))
def test_the_doctor_claims_what_extract_does(name, scenes, tmp_path):
    pipe = {**PIPELINES, **MORE_TEACHERS}[name]()
    pipe.save_pretrained(tmp_path / "pipe")
    claim = results(tmp_path / "pipe")["extraction"]
    assert claim == results(pipe)["extraction"]
    accepted = claim.removeprefix("of target stores, by ").split(" or ") if claim.startswith("of target stores") else []
    pairs = [Pair("0", scenes[0].image, "a cat")]
    few = {"timesteps": (51,), "inversion_steps": 2, "diffusion_steps": 2, "inner_steps": 1}
    for inversion in get_args(Inversion):
        config = TeacherConfig(inversion=inversion, guidance_scale=7.5 if inversion == "null_text" else 1.0, **few)
        if inversion in accepted:
            assert extract(tmp_path / "pipe", pairs, tmp_path / inversion, config, progress=False).written == 1
        else:
            with pytest.raises((ModelError, ConfigError), match="" if accepted else claim[:40]):
                extract(tmp_path / "pipe", pairs, tmp_path / inversion, config, progress=False)


def test_a_pipeline_that_does_not_load_is_not_claimed(tmp_path, scenes):
    """Kolors as it was published: an index that says StableDiffusionXLPipeline, and a text encoder in code of its own."""
    PIPELINES["StableDiffusionXLPipeline"]().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    own = {"text_encoder": ["modeling_chatglm", "ChatGLMModel"], "tokenizer": ["tokenization_chatglm", "ChatGLMTokenizer"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | own))
    report = {finding.topic: finding for finding in examine(tmp_path)}
    assert report["extraction"].result.startswith("none: ")
    assert "is a ChatGLMModel of modeling_chatglm" in report["extraction"].result
    assert report["extraction"].remedy
    with pytest.raises(ModelError, match="is a ChatGLMModel of modeling_chatglm"):
        extract(tmp_path, [Pair("0", scenes[0].image, "a cat")], tmp_path / "store", progress=False)


def test_what_is_refused_at_once_imports_no_model_library(tmp_path):
    code = (
        "import sys; from lavender.doctor import examine; from lavender.errors import ModelError\n"
        f"try: examine({str(tmp_path)!r})\nexcept ModelError as error: print(error)\n"
        "loaded = {'torch', 'transformers', 'diffusers', 'peft'} & set(sys.modules); assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "it is empty" in done.stdout


@pytest.mark.full  # the libraries' own imports take seconds
@pytest.mark.parametrize(
    ("examined", "unused"),
    [
        ("examine({folder!r})", "diffusers datasets trl lavender.training lavender.teachers"),
        ("examine_machine()", "transformers diffusers peft datasets triton torch._dynamo lavender.students lavender.teachers"),
    ],
)
def test_an_examination_imports_what_it_needs(examined, unused, student_folder):
    code = (
        f"import sys; from lavender.doctor import examine, examine_machine; {examined.format(folder=str(student_folder))}\n"
        f"loaded = set({unused.split()}) & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# The machine

WITHOUT_TORCH = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refusing())
from lavender.cli import main
main()
"""
OPERATIONS = [f"{operation} {dtype}" for operation in ("row_maps", "column_maps") for dtype in ("float16", "bfloat16", "float32")]


def machine() -> tuple[dict[str, str], dict[str, str]]:
    """What was found, and the remedies, by topic."""
    findings = examine_machine()
    return {f.topic: f.result for f in findings}, {f.topic: f.remedy for f in findings if f.remedy}


@pytest.fixture
def no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """Puts a CUDA device with NVRTC and a driver into the machine, whose kernels are refused for the given reasons."""

    def put(capability: tuple[int, int], *reasons: str) -> None:
        for name, result in {
            "is_available": True,
            "device_count": 1,
            "get_device_capability": capability,
            "get_device_name": "Some Card",
            "get_arch_list": ["sm_70", "sm_75", "sm_90", "compute_90"],
            "get_device_properties": SimpleNamespace(total_memory=15 * 2**30),
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, result=result: result)
        monkeypatch.setattr(cuda, "runner", SimpleNamespace(why_not=lambda program, device: list(reasons)))
        monkeypatch.setattr(cuda, "_driver", lambda: SimpleNamespace(cuDriverGetVersion=answer))
        monkeypatch.setattr(nvrtc, "find_nvrtc", lambda _: SimpleNamespace(path="/nvrtc", version=(12, 6), architectures=(70, 100)))
        monkeypatch.setattr(dispatch, "HAS_TRITON", True)
        monkeypatch.setenv("LAVENDER_CACHE", str(tmp_path))

    def answer(version) -> int:
        version._obj.value = 12040
        return 0

    return put


def no_nvrtc(architecture):
    raise nvrtc.CompileError(f"there is no NVRTC for {architecture}")


def no_driver():
    raise cuda.DriverError("the driver does not load")


def test_a_machine_without_a_card(no_card, monkeypatch, tmp_path):
    monkeypatch.setenv("LAVENDER_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    report, remedies = machine()
    assert not remedies
    assert report["lavender"].startswith(f"{lavender.__version__} in ")
    assert report["python"].startswith(platform.python_version())
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    assert report["torch"] == f"{torch.__version__}, built for {built_for}"
    assert report["CUDA device"].startswith("none: the kernels run by 'torch'")
    assert "the tensors are on cpu" in report["triton"]
    library = nvrtc.find_nvrtc()
    version, known = "{}.{}".format(*library.version), ", ".join(str(known / 10) for known in library.architectures)
    assert report["NVRTC"] == f"{version} ({library.path}), for compute capability {known}"
    assert "CUDA driver" in report
    assert report["kernel cache"] == f"{tmp_path / 'not' / 'yet' / 'cubins'}, can be written"
    assert {report[operation] for operation in OPERATIONS} == {"by 'torch'"}
    assert {"transformers", "diffusers", "peft", "accelerate", "datasets", "deepspeed"} <= set(report)
    assert list((tmp_path / "not" / "yet" / "cubins").iterdir()) == []  # it was tried


def test_what_a_cpu_does_not_need_is_no_fault(no_card, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAVENDER_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    monkeypatch.setattr(nvrtc, "find_nvrtc", no_nvrtc)
    monkeypatch.setattr(cuda, "_driver", no_driver)
    report, remedies = machine()
    assert not remedies
    assert report["triton"] == "not installed"
    assert report["NVRTC"] == "there is no NVRTC for None"
    assert report["CUDA driver"] == "the driver does not load"
    assert "cannot be written" in report["kernel cache"]
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "row_maps float16      by 'torch'" in result.output


def test_a_card_whose_kernels_run(card, student):
    card((7, 0))
    report, remedies = machine()
    assert not remedies
    assert report["cuda:0"] == "Some Card, compute capability 7.0, 15.0 GiB"
    assert "CUDA device" not in report
    assert "compute capability 7.0 is below 8.0" in report["triton"]
    assert report["NVRTC"] == "12.6 (/nvrtc), for compute capability 7.0, 10.0"
    assert report["CUDA driver"] == "for CUDA up to 12.4"
    for operation in ("row_maps", "column_maps"):
        assert report[f"{operation} float16"].startswith("by 'cuda'; not by 'triton': compute capability 7.0 is below 8.0")
        for dtype in ("bfloat16", "float32"):
            assert report[f"{operation} {dtype}"].startswith("by 'torch'; not by 'triton': ")
            assert f"not by 'cuda': the dtype is torch.{dtype}" in report[f"{operation} {dtype}"]
    assert results(student.model.half())["kernels"].startswith("row_maps by 'cuda' (heads of 32 in float16); not by 'triton': ")


def test_a_card_whose_kernels_are_refused(card, student):
    card((7, 0), "line one\nline two")
    report, remedies = machine()
    assert remedies == {
        f"{name} float16": "the card could run its own kernels: mend what refuses them" for name in ("row_maps", "column_maps")
    }
    for operation in ("row_maps", "column_maps"):
        assert report[f"{operation} float16"].startswith("by 'torch'; not by 'triton': ")
        assert report[f"{operation} float16"].endswith("not by 'cuda': line one\nline two")
    assert results(student.model.half())["kernels"].endswith("not by 'cuda': line one\nline two")
    output = CliRunner().invoke(app, ["doctor"]).output
    assert f"\n{'':<22}line two\n" in output


def test_a_torch_that_does_not_know_the_card_is_reported(card, monkeypatch):
    """Built for CUDA 13, on a V100: NVRTC 12 beside it compiles lavender's kernels, and nothing else runs."""
    card((7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_100a", "compute_100"])
    report, remedies = machine()
    assert report["cuda:0"].endswith("this torch has no kernels for it, but for sm_75, sm_80, sm_100a, compute_100")
    assert remedies == {"cuda:0": "install a torch that knows the card: PyTorch's index for CUDA 12.6 (cu126), torch<2.15"}
    card((12, 0))  # by the PTX
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_100a", "compute_100"])
    assert "cuda:0" not in machine()[1]


def test_what_a_card_needs_has_a_remedy(card, monkeypatch, tmp_path):
    card((7, 5), "there is no NVRTC")
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAVENDER_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(nvrtc, "find_nvrtc", no_nvrtc)
    monkeypatch.setattr(cuda, "_driver", no_driver)
    report, remedies = machine()
    assert report["NVRTC"] == "there is no NVRTC for 75"
    assert set(remedies) == {"NVRTC", "CUDA driver", "kernel cache", "row_maps float16", "column_maps float16"}
    card((9, 0), "there is no NVRTC")  # Triton's kernels run: nobody misses the others
    monkeypatch.setattr(nvrtc, "find_nvrtc", no_nvrtc)
    report, remedies = machine()
    assert not remedies
    assert {report[operation] for operation in OPERATIONS} == {"by 'triton'"}


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_a_new_card_needs_triton(card, monkeypatch):
    card((9, 0))
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    report, remedies = machine()
    assert remedies == {"triton": "pip install triton"}
    assert report["row_maps float16"].startswith("by 'cuda'; not by 'triton': triton is not installed")


def test_without_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, "doctor"], capture_output=True, text=True)
    assert done.returncode == 1
    assert not done.stderr
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines()}
    assert lines["lavender"].startswith(lavender.__version__)
    assert lines["torch"] == "not installed: nothing of lavender runs without it"
    assert lines["->"] == "pip install torch"
    assert lines["numpy"][0].isdigit()
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, "doctor", "model"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("lavender: this needs the package torch")

"""What may be wrong with what a user gives, one case a kind."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .hostile import CANARY, Case

EXTRACT = "extract --model teacher --data data/captions.jsonl --out out --inversion noise --timesteps 51 --map-size 8"
TRAIN = "train --model student --data data/captions.jsonl --out out --steps 1 --batch-size 2"
ALIGNED = f"{TRAIN} --targets store"
FULL = f"{TRAIN} --lora-rank 0"
RESUME = "train --model student --data data/captions.jsonl --batch-size 2 --targets store --steps 2 --save-steps 1 --out run"
EVALUATE = "evaluate --student student --scenes 1"
ADAPTED = f"{EVALUATE} --adapter adapter"
TAUGHT = "evaluate --teacher teacher --scenes 1"
MAPS = "evaluate maps store --masks data/grounding.jsonl"
REPORT = "report demo"
DOCTOR = "doctor student"
EXPORT = "targets export store out --format folder --images data"

CASES: dict[str, Case] = {}

Spoil = Callable[[Path], object]


def case(name: str, arguments: str, spoil: Spoil | None = None, ends: str = "line", says: str = "", **more: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(name, arguments, spoil, ends, says, **more)


def write(name: str, content: str | bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode(errors="surrogatepass") if isinstance(content, str) else content)

    return spoil


def edit(name: str, change: Callable[[Any], Any]) -> Spoil:
    """Changes a file's JSON: by what a function returns, or does to it if it returns None."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        changed = change(values)
        (folder / name).write_text(json.dumps(values if changed is None else changed))

    return spoil


def put(name: str, *keys: str | int, value: Any) -> Spoil:
    """Puts a value into a file's JSON."""

    def change(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return edit(name, change)


def cut(name: str, keeps: float = 0.5) -> Spoil:
    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keeps)])

    return spoil


def remove(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def both(*spoils: Spoil) -> Spoil:
    def spoil(folder: Path) -> None:
        for each in spoils:
            each(folder)

    return spoil


def folder_at(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / name
        for place in (path, *path.parents):
            if place.is_file():
                place.unlink()
        path.mkdir(parents=True)

    return spoil


def link(name: str, to: str) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(to)

    return spoil


def pipe(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return spoil


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / CANARY)

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.path),))


def malicious(name: str, torch_format: bool = True) -> Spoil:
    """Puts a pickle that executes code into a file, plainly or in the archive that torch writes."""

    def spoil(folder: Path) -> None:
        data = pickle.dumps({"weight": Malicious(folder)})
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not torch_format:
            path.write_bytes(data)
            return
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")

    return spoil


def tensors(name: str, change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Changes the tensors of a safetensors file."""

    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        values = load_file(folder / name)
        change(values)
        save_file({key: value.contiguous() for key, value in values.items()}, folder / name, metadata={"format": "pt"})

    return spoil


def first_tensor(change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def changed(values: dict[str, Any]) -> None:
        key = max(values, key=lambda name: values[name].ndim)
        values[key] = change(values[key])

    return changed


def header(length: int, text: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + text


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A picture whose header says a size, whatever follows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def picture(kind: str, keeps: float = 1.0) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(buffer, kind)
    return buffer.getvalue()[: max(1, int(buffer.tell() * keeps))]


def line(image: str = "images/00000.png", **more: Any) -> str:
    words = {"image": image, "caption": "a red ring", "question": "What?", "answer": "a red ring"}
    return json.dumps({**words, **more}) + "\n"


DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "1" + "0" * 5000

# Paths

PATHS: dict[str, tuple[str, Spoil | None]] = {
    "missing": ("nothing", None),
    "empty folder": ("odd", folder_at("odd")),
    "empty file": ("odd", write("odd", b"")),
    "junk": ("odd", write("odd", bytes(range(256)) * 40)),
    "pipe": ("odd", pipe("odd")),
    "device": ("/dev/zero", None),
    "link to itself": ("odd", link("odd", "odd")),
    "long name": ("x" * 5000, None),
    "new line in name": ("'a\nb'", None),
    "empty name": ("''", None),
    "unicode": ("'пус то/☃'", None),
    "nobody serves": ("nosuch://host/x", None),
    "home of nobody": ("~nobody-there/x", None),
}
INPUTS = {
    "extract model": "extract --model {} --data data/captions.jsonl --out out --inversion noise",
    "extract data": "extract --model teacher --data {} --out out --inversion noise --timesteps 51 --map-size 8",
    "train model": "train --model {} --data data/captions.jsonl --out out --steps 1",
    "train data": "train --model student --data {} --out out --steps 1",
    "train targets": "train --model student --data data/captions.jsonl --targets {} --out out --steps 1",
    "train adapter": "train --model student --data data/captions.jsonl --adapter {} --out out --steps 1",
    "evaluate student": "evaluate --student {} --scenes 1",
    "evaluate adapter": "evaluate --student student --adapter {} --scenes 1",
    "evaluate teacher": "evaluate --teacher {} --scenes 1",
    "maps store": "evaluate maps {} --masks data/grounding.jsonl",
    "maps masks": "evaluate maps store --masks {}",
    "info": "targets info {}",
    "verify": "targets verify {}",
    "merge": "targets merge store {} --out out",
    "import": "targets import {} --out out",
    "export": "targets export {} out --format folder",
    "export samples": "targets export store out --format folder --samples {}",
    "report": "report {}",
    "doctor": "doctor {}",
}
for n, (what, command) in enumerate(INPUTS.items()):
    for m, (kind, (path, make)) in enumerate(PATHS.items()):
        if (n + m) % 4 == 0:
            case(f"{what}: {kind}", command.format(path), make)
OUTPUTS = {
    "extract out": EXTRACT.replace("--out out", "--out {}"),
    "train out": TRAIN.replace("--out out", "--out {}"),
    "demo out": "demo --out {}",
    "evaluate out": f"{EVALUATE} --out {{}}",
    "maps out": f"{MAPS} --out {{}}",
    "merge out": "targets merge store --out {}",
    "import out": "targets import data/images --out {}",
    "export out": "targets export store {} --format folder --images data",
}
PLACES: dict[str, tuple[str, Spoil | None]] = {
    "a file": ("odd", write("odd", "mine")),
    "below a file": ("odd/below", write("odd", "mine")),
    "long name": ("x" * 5000, None),
    "pipe": ("odd", pipe("odd")),
    "device": ("/dev/full", None),
    "link to nothing": ("odd/below", link("odd", "nowhere")),
}
for n, (what, command) in enumerate(OUTPUTS.items()):
    for m, (kind, (path, make)) in enumerate(PLACES.items()):
        if (n + m) % 2 == 0 and not (kind == "a file" and what in ("evaluate out", "maps out")):  # which they write
            case(f"{what}: {kind}", command.format(path), make)

# Options

for text in (
    f"{EXTRACT} --seed -1", f"{TRAIN} --seed -1", "demo --out out --seed -1", f"{TRAIN} --seed 99999999999999999999",
    f"{EXTRACT} --seed 99999999999999999999", f"{TRAIN} --steps 0", f"{TRAIN} --steps -1", f"{TRAIN} --steps x",
    f"{TRAIN} --batch-size 0",
    f"{TRAIN} --learning-rate nan", f"{TRAIN} --learning-rate inf", f"{TRAIN} --learning-rate -1", f"{TRAIN} --lora-rank -1",
    f"{TRAIN} --save-steps 0", f"{TRAIN} --nonsense", f"{TRAIN} --preset nonsense", f"{ALIGNED} --weight nan",
    f"{ALIGNED} --weight -1",
    f"{ALIGNED} --layers 99", f"{ALIGNED} --layers x", f"{ALIGNED} --layers -1", f"{ALIGNED} --heads 99.99", f"{ALIGNED} --heads x",
    f"{ALIGNED} --heads best:0", f"{ALIGNED} --heads best:99999", f"{ALIGNED} --aligner nonsense", f"{ALIGNED} --rows nonsense",
    f"{EXTRACT} --timesteps 1e9", f"{EXTRACT} --timesteps ''", f"{EXTRACT} --timesteps -1", f"{EXTRACT} --map-size 0",
    f"{EXTRACT} --device tpu9", f"{EXTRACT} --device ''", f"{EXTRACT} --device cuda:99", f"{EXTRACT} --device meta",
    f"{EXTRACT} --engine nonsense", f"{EXTRACT} --batch-size 0",
    f"{EXTRACT} --layers nonsense", f"{EXTRACT} --resolutions 7", f"{EXTRACT} --heads 99", f"{EXTRACT} --dtype int8",
    f"{EXTRACT} --image-size 7", f"{EXTRACT} --image-size -8", f"{EXTRACT} --guidance-scale nan", f"{EXTRACT} --inversion nonsense",
    f"{EXTRACT} --preview 0", f"{EXTRACT} --preview x", f"{EXTRACT} --preview 1 --failed-only",
    f"{EXTRACT} --image-column x", f"{EXTRACT} --caption-column x", f"{EXTRACT} --id-column x", f"{EXTRACT} --images nothing",
    f"{EXTRACT} --captions some", f"{EVALUATE} --scenes 0", f"{EVALUATE} --scenes -1", f"{EVALUATE} --scenes x",
    f"{EVALUATE} --rows x",
    f"{EVALUATE} --teacher teacher", "evaluate --scenes 1 maps store --masks data/grounding.jsonl", "evaluate nonsense", "nonsense",
    "targets nonsense", "targets merge --out out", "targets export store out", "targets export store out --format nonsense",
    "extract",
    "train --data data/captions.jsonl --out out", "doctor student extra", f"{EXTRACT} --data", "report --nonsense",
):  # fmt: skip
    case(f"option: {text.split('--out out')[-1].strip() or text} of {text.split()[0]}", text)
for text in (f"{EXTRACT} --batch-size 99999999999999999999", f"{EXTRACT} --split nonsense"):  # of three pictures in one file
    case(f"option: {text.split('--out out')[-1].strip()} of extract", text, ends="works")
HARMLESS = (
    "logging_steps",
    "fp16",
    "skip_memory_metrics",
    "local_rank",
    "use_cpu",
    "training.arguments",
    "alignment.norm",
    "words.exclude",
)
"""Settings that the libraries take whatever they are, or that fit."""
for setting in (
    "training.lora_targets=(", "training.lora_targets=[", "training.lora_targets=nonsense", "training.lora_targets=[1]",
    "training.lora_targets=", "training.lora_targets=.*", "training.lora_alpha=x", "training.lora_dropout=2",
    "training.lora_alpha=NaN",
    "training.arguments.report_to=nonsense", "training.arguments.bf16=x", "training.arguments.bf16=[1]",
    "training.arguments.optim=nonsense",
    "training.arguments.gradient_accumulation_steps=x", "training.arguments.gradient_accumulation_steps=0",
    "training.arguments.gradient_accumulation_steps=-1", "training.arguments.gradient_accumulation_steps=1.5",
    "training.arguments.logging_steps=x", "training.arguments.logging_steps=-1", "training.arguments.logging_steps=0",
    "training.arguments.dataloader_num_workers=x", "training.arguments.dataloader_num_workers=-1", "training.arguments.nonsense=1",
    "training.arguments.weight_decay=x", "training.arguments.weight_decay=NaN", "training.arguments.max_grad_norm=x",
    "training.arguments.lr_scheduler_type=nonsense", "training.arguments.lr_scheduler_type=7", "training.arguments.adam_beta1=x",
    "training.arguments.adam_beta1=2", "training.arguments.adam_epsilon=-1", "training.arguments.deepspeed=nothing.json",
    "training.arguments.deepspeed=7", "training.arguments.fsdp=nonsense", "training.arguments.save_total_limit=x",
    "training.arguments.save_strategy=nonsense", "training.arguments.eval_strategy=steps", "training.arguments.push_to_hub=true",
    "training.arguments.torch_compile=x", "training.arguments.output_dir=x", "training.arguments.accelerator_config=nothing.json",
    "training.arguments.accelerator_config=7", "training.arguments.lr_scheduler_kwargs=7", "training.arguments.optim_args=nonsense",
    "training.arguments.neftune_noise_alpha=x", "training.arguments.log_level=nonsense",
    "training.arguments.dataloader_prefetch_factor=2",
    "training.arguments.group_by_length=true", "training.arguments.auto_find_batch_size=x", "training.arguments.label_names=7",
    "training.arguments.average_tokens_across_devices=x", "training.arguments.load_best_model_at_end=true",
    "training.arguments.fp16=true", "training.arguments.full_determinism=x", "training.arguments.skip_memory_metrics=false",
    "training.arguments.use_cpu=false", "training.arguments.local_rank=7", "training.arguments.label_smoothing_factor=x",
    "training.arguments.warmup_ratio=x", "training.arguments.max_steps=9", "training.arguments.run_name=7",
    "training.arguments.gradient_checkpointing_kwargs=7", "training.arguments.ignore_data_skip=x", "training.arguments={}",
    "training.arguments=[]", "training.arguments=x", "training.max_length=x", "training.max_length=0", "training.max_length=1",
    "training.warmup_steps=-1", "training.dtype=float8", "training.aligner_steps=-1", "alignment.aggregation=nonsense",
    "alignment.norm=group", "alignment.hidden_channels=0", "alignment.max_grid=0", "alignment.until=0", "alignment.decay=-1",
    "alignment.distance=kl", "alignment.renormalize=x", "alignment.nonsense=1", "alignment.parallel_heads=0", "words.match=root",
    "words.tagger=nonsense", "words.min_coverage=2", "words.roles=[nonsense]", "words.exclude=7", "nonsense=1", "nonsense",
    "training.arguments.a.b=1", "=", "training.=1", ".steps=1", "training.steps.x=1", f"training.steps={HUGE}",
    f"words.exclude={DEEP[:2000]}",
    "training.learning_rate=1e400", "training.steps=true", "training.steps=null", "training.steps=1.5", "training.steps=\\ud800",
):  # fmt: skip
    words = setting.removeprefix("training.arguments.").split("=")[0]
    ends = "line|works" if words in HARMLESS else "line"
    case(f"set: {setting[:70]}", f"{ALIGNED} --set '{setting}'", ends=ends)
for setting in (
    "head_reduction=x", "vae_tiling=x", "layer_weights=[1,x]", "layer_weights=[1,2]", "threads=x", "threads=-1", "threads=0",
    "nonsense=1",
    "first_timestep=x", "first_timestep=9999", "timestep_weights=[NaN]", "timestep_weights=[1,2]", "shard_size=0", "shard_size=x",
    "normalization=x", "renormalize=x", "inner_steps=3", "nonsense", "=", "map_size=9", "shard_size=1e30",
):  # fmt: skip
    case(f"set of extract: {setting}", f"{EXTRACT} --set '{setting}'")

# A student's files

VALUES: dict[str, Any] = {
    "text": "x", "none": None, "list": [], "mapping": {}, "negative": -1, "zero": 0, "huge": 10**9, "fraction": 1.5, "true": True,
    "infinite": float("inf"), "enormous": 10**400,
}  # fmt: skip
STUDENT = "student/config.json"
FIELDS = (
    ("text_config", "hidden_size"),
    ("text_config", "num_hidden_layers"),
    ("text_config", "num_attention_heads"),
    ("text_config", "vocab_size"),
    ("text_config", "intermediate_size"),
    ("text_config",),
    ("vision_config",),
    ("vision_config", "image_size"),
    ("vision_config", "patch_size"),
    ("image_token_index",),
    ("model_type",),
    ("architectures",),
    ("dtype",),
    ("text_config", "rope_parameters"),
)
for n, keys in enumerate(FIELDS):
    for m, (kind, value) in enumerate(VALUES.items()):
        if (n + m) % 3:
            continue
        command = (DOCTOR, EVALUATE, TRAIN)[(n + m) % 3]
        case(
            f"config {'.'.join(keys)} {kind} of {command.split()[0]}",
            command,
            put(STUDENT, *keys, value=value),
            ends="line|lists|works",
        )
CONFIGS = {
    "empty": b"", "junk": bytes(range(256)), "cut": b'{"model_type": "llava", ', "list": b"[]", "text": b'"llava"', "null": b"null",
    "number": b"7", "no type": b"{}", "deep": DEEP.encode(), "not utf-8": b'{"model_type": "\xff"}',
    "unknown type": b'{"model_type": "nonsense"}', "a text model": b'{"model_type": "llama"}', "own code":
    b'{"model_type": "nonsense", "auto_map": {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}}',
}  # fmt: skip
for n, (kind, content) in enumerate(CONFIGS.items()):
    command = (DOCTOR, EVALUATE, TRAIN)[n % 3]
    case(f"config.json {kind} of {command.split()[0]}", command, write(STUDENT, content))
case("config.json is a folder", EVALUATE, folder_at(STUDENT))
case("config.json is a pipe", EVALUATE, pipe(STUDENT))
case("config.json is a pipe of doctor", DOCTOR, pipe(STUDENT))
case("config.json links out", EVALUATE, link(STUDENT, "/etc/passwd"))
for kind, value in {"text": "x", "unknown": {"quant_method": "nonsense"}, "empty": {}, "list": [],
"bnb": {"quant_method": "bitsandbytes"},
                    "gptq": {"quant_method": "gptq", "bits": 4}}.items():  # fmt: skip
    case(f"quantization_config {kind}", EVALUATE, put(STUDENT, "quantization_config", value=value), ends="line|works")
WEIGHTS = "student/model.safetensors"
DAMAGES: dict[str, Callable[[str], Spoil]] = {
    "cut": cut,
    "cut in the header": lambda name: cut(name, 0.0005),
    "empty": lambda name: write(name, b""),
    "junk": lambda name: write(name, bytes(range(256)) * 99),
    "header too long": lambda name: write(name, header(2**63)),
    "header longer than the file": lambda name: write(name, header(99999)),
    "header no JSON": lambda name: write(name, header(4, b"nope")),
    "header a list": lambda name: write(name, header(2, b"[]")),
    "no tensors": lambda name: write(name, header(2, b"{}")),
    "offsets out of the file": lambda name: write(
        name, header(68, b'{"lm_head.weight":{"dtype":"F32","shape":[9,9],"data_offsets":[0,9]}}'[:68])
    ),
    "gone": remove,
    "a folder": folder_at,
    "a pipe": pipe,
    "other shape": lambda name: tensors(name, first_tensor(lambda value: value[:-1])),
    "a number": lambda name: tensors(name, first_tensor(lambda value: value.flatten()[0])),
    "NaN": lambda name: tensors(name, first_tensor(lambda value: value * float("nan"))),
    "integers": lambda name: tensors(name, first_tensor(lambda value: value.long())),
    "a tensor less": lambda name: tensors(name, lambda values: values.pop(next(iter(values)))),
    "malicious pickle": lambda name: malicious(name, torch_format=False),
}
for n, (kind, damage) in enumerate(DAMAGES.items()):
    command = (EVALUATE, TRAIN, DOCTOR)[n % 3]
    ends = "line|lists" if command == DOCTOR else "line"
    case(f"weights {kind} of {command.split()[0]}", command, damage(WEIGHTS), ends=ends)
for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "model.pth"):
    for torch_format in (True, False):
        kind = "archive" if torch_format else "plain"
        spoil = both(remove(WEIGHTS), malicious(f"student/{name}", torch_format))
        case(f"malicious {name} {kind}", EVALUATE, spoil)
case("malicious pytorch_model.bin of doctor", DOCTOR, both(remove(WEIGHTS), malicious("student/pytorch_model.bin")))
INDEX = "student/model.safetensors.index.json"
for kind, content in {
    "empty": "", "a list": "[]", "no map": "{}", "map a list": '{"weight_map": []}', "map of numbers": '{"weight_map": {"a": 7}}',
    "map leads out": '{"metadata": {}, "weight_map": {"a": "../../etc/passwd"}}',
    "shards missing": '{"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}', "deep": DEEP,
}.items():  # fmt: skip
    command = (EVALUATE, DOCTOR)[len(kind) % 2]
    case(f"index {kind} of {command.split()[0]}", command, both(remove(WEIGHTS), write(INDEX, content)))
for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"):
    for kind, content in {"empty": "", "cut": '{"a', "list": "[]", "empty mapping": "{}", "number": "7", "deep": DEEP}.items():
        command = (EVALUATE, TRAIN)[len(name + kind) % 2]
        case(f"{name} {kind} of {command.split()[0]}", command, write(f"student/{name}", content), ends="line|works")
    case(f"{name} is a folder", TRAIN, folder_at(f"student/{name}"), ends="line|works")
case("tokenizer.json gone", TRAIN, remove("student/tokenizer.json"))
case("tokenizer.json wrong types", TRAIN, put("student/tokenizer.json", "model", "vocab", value=[1, 2]))
case("tokenizer.json other words", TRAIN, put("student/tokenizer.json", "model", "vocab", value={"x": 0, "<unk>": 1}))
case("tokenizer class unknown", TRAIN, put("student/tokenizer_config.json", "tokenizer_class", value="Nonsense"), ends="line|works")
case("processor class unknown", TRAIN, put("student/processor_config.json", "processor_class", value="Nonsense"))
case(
    "image processor unknown",
    TRAIN,
    edit("student/processor_config.json", lambda c: c | {"image_processor": {"image_processor_type": "X"}}),
)
case(
    "image size zero",
    TRAIN,
    edit("student/processor_config.json", lambda c: c["image_processor"].update(size={"height": 0, "width": 0})),
)
case("image size text", TRAIN, edit("student/processor_config.json", lambda c: c["image_processor"].update(size="x")))
case(
    "image mean of two", TRAIN, edit("student/processor_config.json", lambda c: c["image_processor"].update(image_mean=[0.5, 0.5]))
)
case("patch size zero", TRAIN, put("student/processor_config.json", "patch_size", value=0))
case("processor gone", TRAIN, remove("student/processor_config.json"))
TEMPLATE = "student/chat_template.jinja"
for kind, content in {
    "syntax": "{% if", "raises": "{{ raise_exception('no') }}", "unknown name": "{{ nonsense.x.y }}", "empty": "", "endless":
    "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}", "without messages": "hello",
    "binary": "\udcff",
    "recursive": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "attribute": "{{ ''.__class__.__mro__ }}",
}.items():  # fmt: skip
    if kind != "endless":
        case(f"chat template {kind}", (TRAIN, EVALUATE)[len(kind) % 2], write(TEMPLATE, content))
case("chat template gone", TRAIN, remove(TEMPLATE))
for key, value in {
    "return_dict_in_generate": True, "num_beams": 4, "stop_strings": ["a"], "token_healing": True, "prompt_lookup_num_tokens": 3,
    "penalty_alpha": 0.6, "cache_implementation": "quantized", "max_time": "x", "bad_words_ids": "x", "suppress_tokens": ["x"],
    "eos_token_id": "x", "output_hidden_states": [None],
}.items():  # fmt: skip
    case(f"generation {key}", EVALUATE, put("student/generation_config.json", key, value=value), ends="line|works")
case("train out a model", TRAIN.replace("--out out", "--out student"), says="holds a model")
for setting in (
    "dataloader_persistent_workers=true", "neftune_noise_alpha=-5", "report_to=mlflow",
    """deepspeed='{"zero_optimization":{"stage":2},"train_micro_batch_size_per_gpu":"auto"}'""",
):  # fmt: skip
    case(f"argument {setting}", f"{ALIGNED} --set training.arguments.{setting}", ends="line")
case("chat template a folder", TRAIN, folder_at(TEMPLATE))

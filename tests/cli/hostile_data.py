"""More kinds: teachers, adapters, checkpoints, stores, pictures, data sets, masks, results and sizes."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from typing import Any

from .hostile_kinds import (
    ADAPTED,
    ALIGNED,
    CASES,
    DAMAGES,
    DEEP,
    EVALUATE,
    EXPORT,
    EXTRACT,
    HUGE,
    MAPS,
    REPORT,
    RESUME,
    STUDENT,
    TAUGHT,
    TRAIN,
    VALUES,
    both,
    case,
    cut,
    folder_at,
    header,
    line,
    link,
    malicious,
    picture,
    pipe,
    png,
    put,
    remove,
    write,
)  # fmt: skip

__all__ = ["CASES"]

# A teacher's files

TEACHER = "teacher/model_index.json"
TEACHER_DOCTOR = "doctor teacher"
for kind, content in {
    "empty": "", "cut": '{"_class_name": "Stable', "list": "[]", "no class": "{}", "deep": DEEP,
    "class unknown": '{"_class_name": "Nonsense"}', "class a number": '{"_class_name": 7}',
    "class no pipeline": '{"_class_name": "UNet2DModel"}',
    "class of audio": '{"_class_name": "StableAudioPipeline"}', "class a list": '{"_class_name": ["a", "b"]}',
}.items():  # fmt: skip
    command = (EXTRACT, TEACHER_DOCTOR)[len(kind) % 2]
    case(f"model_index {kind} of {command.split()[0]}", command, write(TEACHER, content))
for kind, value in {"unknown": ["diffusers", "Nonsense"], "own code": ["own", "Model"], "text": "x", "number": 7, "none": None,
                    "three": ["a", "b", "c"], "numbers": [1, 2], "another": ["diffusers", "AutoencoderKL"]}.items():  # fmt: skip
    part = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")[len(kind) % 5]
    command = (EXTRACT, TEACHER_DOCTOR)[len(kind) % 2]
    case(f"{part} {kind} of {command.split()[0]}", command, put(TEACHER, part, value=value), ends="line|lists")
for part, file in (("unet", "config.json"), ("vae", "config.json"), ("text_encoder", "config.json"), ("tokenizer",
"tokenizer.json"),
                   ("scheduler", "scheduler_config.json")):  # fmt: skip
    case(f"{part} gone", EXTRACT, remove(f"teacher/{part}"))
    case(f"{part} gone of doctor", TEACHER_DOCTOR, remove(f"teacher/{part}"), ends="line|lists")
    for kind, content in {"empty": "", "list": "[]", "mapping": "{}", "deep": DEEP}.items():
        command = (EXTRACT, TEACHER_DOCTOR)[len(part + kind) % 2]
        spoil = write(f"teacher/{part}/{file}", content)
        case(f"{part} config {kind} of {command.split()[0]}", command, spoil, ends="line|lists|works")
for part, key in (("unet", "cross_attention_dim"), ("unet", "block_out_channels"), ("vae", "latent_channels"), ("vae",
"scaling_factor"),
                  ("text_encoder", "hidden_size"), ("scheduler", "num_train_timesteps"), ("scheduler", "beta_schedule"),
                  ("scheduler", "prediction_type"), ("unet", "sample_size")):  # fmt: skip
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    for kind in ("text", "none", "negative", "huge"):
        command = (EXTRACT, TEACHER_DOCTOR)[len(key + kind) % 2]
        spoil = put(f"teacher/{part}/{file}", key, value=VALUES[kind])
        case(f"{part} {key} {kind} of {command.split()[0]}", command, spoil, ends="line|lists|works", memory=kind == "huge")
for n, (kind, damage) in enumerate(DAMAGES.items()):
    name = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")[n % 3]
    case(f"{name.split('/')[0]} weights {kind}", (EXTRACT, TAUGHT)[n % 2], damage(f"teacher/{name}.safetensors"))
for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
    other = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    spoil = both(remove(f"teacher/{part}/{name}.safetensors"), malicious(f"teacher/{part}/{other}"))
    case(f"malicious {part}", EXTRACT, spoil)
case("malicious safety checker", EXTRACT, both(put(TEACHER, "safety_checker", value=["stable_diffusion",
"StableDiffusionSafetyChecker"]),
                                               malicious("teacher/safety_checker/pytorch_model.bin")),
                                               ends="line|works")  # fmt: skip

# Adapters

LORA = "adapter/adapter_config.json"
for kind, content in {"empty": "", "cut": '{"peft_type": "LO', "list": "[]", "mapping": "{}", "deep": DEEP, "number": "7"}.items():
    command = (ADAPTED, f"{TRAIN} --adapter adapter", "doctor adapter")[len(kind) % 3]
    case(f"adapter_config {kind} of {command.split()[0]}", command, write(LORA, content), ends="line|lists")
for key, value in (
    ("peft_type", "NONSENSE"), ("peft_type", 7), ("peft_type", "PREFIX_TUNING"), ("r", "x"), ("r", -1), ("r", 0), ("r", 10**9),
    ("r", 1.5),
    ("target_modules", "("), ("target_modules", ["nonsense"]), ("target_modules", 7), ("target_modules", None), ("lora_alpha", "x"),
    ("base_model_name_or_path", 7), ("base_model_name_or_path", "no/such"), ("base_model_name_or_path", None), ("task_type",
    "NONSENSE"),
    ("modules_to_save", ["nonsense"]), ("modules_to_save", 7), ("rank_pattern", "x"), ("layers_to_transform", ["x"]), ("bias",
    "nonsense"),
    ("auto_mapping", {"base_model_class": "X", "parent_library": "os"}), ("init_lora_weights", "nonsense"), ("unknown_key", 7),
    ("use_dora", True), ("eva_config", 7), ("revision", 7),
):  # fmt: skip
    kind = f"adapter {key} {str(value)[:30]}"
    command = (ADAPTED, f"{TRAIN} --adapter adapter", "doctor adapter")[len(kind) % 3]
    spoil = put(LORA, key, value=value)
    case(f"{kind} of {command.split()[0]}", command, spoil, ends="line|lists|works", needs=("student",), memory=value == 10**9)
for n, (kind, damage) in enumerate(DAMAGES.items()):
    command = (ADAPTED, f"{TRAIN} --adapter adapter")[n % 2]
    case(f"adapter weights {kind}", command, damage("adapter/adapter_model.safetensors"), ends="line|works")
    case(
        f"adapter weights {kind} of doctor", "doctor adapter", damage("adapter/adapter_model.safetensors"), ends="line|lists|works"
    )
for command in (ADAPTED, f"{TRAIN} --adapter adapter", "doctor adapter"):
    spoil = both(remove("adapter/adapter_model.safetensors"), malicious("adapter/adapter_model.bin"))
    case(f"malicious adapter of {command.split()[0]}", command, spoil, ends="line|lists")
case("adapter for the model", "evaluate --student adapter --scenes 1")
case("model for the adapter", f"{EVALUATE} --adapter student")
case("run for the adapter", f"{EVALUATE} --adapter run")
case("adapter with its base gone", "doctor adapter", ends="line|lists")

# Runs and checkpoints

LAST = "run/checkpoints/checkpoint-2"
for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
    for number, torch_format in ((1, True), (2, False)):
        spoil = malicious(f"run/checkpoints/checkpoint-{number}/{name}", torch_format)
        # Without lavender's record, which knows the sizes of its files.
        record = remove(f"run/checkpoints/checkpoint-{number}/lavender.json")
        spoil = both(spoil, record, *([] if number == 2 else [remove(LAST)]))
        case(f"malicious {name} of checkpoint {number}", RESUME, spoil, ends="line|works", writes=("run",))
for n, name in enumerate(("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.safetensors",
                          "trainer_state.json", "adapter_config.json", "lavender.json")):  # fmt: skip
    for m, (kind, damage) in enumerate({"cut": cut(f"{LAST}/{name}"), "empty": write(f"{LAST}/{name}", ""),
    "gone": remove(f"{LAST}/{name}"),
                         "a folder": folder_at(f"{LAST}/{name}"), "a list": write(f"{LAST}/{name}", "[]"),
                         "a pipe": pipe(f"{LAST}/{name}"), "deep": write(f"{LAST}/{name}", DEEP),
                         "linked": link(f"{LAST}/{name}", "/etc/passwd")}.items()):  # fmt: skip
        if (n + m) % 3:
            continue
        case(f"checkpoint {name} {kind}", RESUME, damage, ends="line|works", writes=("run",))
for name in ("run.json", "heads.json", "checkpoints", "adapter", "aligner.safetensors", "history.json"):
    for kind, damage in {"empty": write(f"run/{name}", ""), "a list": write(f"run/{name}", "[]"),
    "a folder": folder_at(f"run/{name}/x/y"),
                         "deep": write(f"run/{name}", DEEP), "pipe": pipe(f"run/{name}")}.items():  # fmt: skip
        case(f"run {name} {kind}", RESUME, damage, ends="line|works", writes=("run",))
for n, key in enumerate(("training", "alignment", "words", "samples", "targets_fingerprint", "model")):
    for kind in ("text", "none", "list", "negative")[n % 2 :: 2]:
        case(f"run.json {key} {kind}", RESUME, put("run/run.json", key, value=VALUES[kind]), ends="line|works", writes=("run",))
for n, key in enumerate(
    ("global_step", "max_steps", "log_history", "epoch", "best_metric", "stateful_callbacks", "train_batch_size")
):
    for kind in ("text", "none", "list", "negative")[n % 2 :: 2]:
        spoil = put(f"{LAST}/trainer_state.json", key, value=VALUES[kind])
        case(f"trainer_state {key} {kind}", RESUME, spoil, ends="line|works", writes=("run",))
case("checkpoint of another name", RESUME, folder_at("run/checkpoints/checkpoint-x"), ends="works", writes=("run",))
case("checkpoint a file", RESUME, both(remove(LAST), write(LAST, "x")), ends="line|works", writes=("run",))

# Stores

MANIFEST = "store/manifest.json"
STORE_COMMANDS = ("targets info store", "targets verify store", MAPS, ALIGNED, EXPORT, EXTRACT.replace("--out out", "--out store"))
for n, (kind, content) in enumerate({"empty": "", "cut": '{"format": "lav', "list": "[]", "mapping": "{}", "deep": DEEP,
"number": HUGE,
                                     "NaN": '{"format": NaN}'}.items()):  # fmt: skip
    for command in STORE_COMMANDS[n % 6 :: 6]:
        case(f"manifest {kind} of {' '.join(command.split()[:2])}", command, write(MANIFEST, content), ends="line|lists")
for n, key in enumerate(("format", "version", "source", "config", "fingerprint", "complete", "shards", "failed")):
    for m, kind in enumerate(("text", "none", "list", "negative", "mapping")):
        command = STORE_COMMANDS[(n + m) % 6]
        case(
            f"manifest {key} {kind}",
            command,
            put(MANIFEST, key, value=VALUES[kind]),
            ends="line|lists|works",
            writes=("out", "store"),
        )
SHARD = "store/data-00000.parquet"
for n, (kind, damage) in enumerate({"cut": cut(SHARD), "empty": write(SHARD, ""), "gone": remove(SHARD), "junk": write(SHARD,
bytes(999)),
                                    "folder": folder_at(SHARD), "pipe": pipe(SHARD), "linked": link(SHARD,
                                    "/etc/passwd")}.items()):  # fmt: skip
    for command in STORE_COMMANDS[n % 2 : 5 : 2]:
        case(f"shard {kind} of {' '.join(command.split()[:2])}", command, damage, ends="line|lists|works")
case("merge a damaged shard", "targets merge store --out out", cut(SHARD))
case("merge into itself", "targets merge store --out store")
case("merge twice the same", "targets merge store store --out out", ends="works")
case("export to an image column", "targets export store out.parquet --format parquet --images nothing", ends="line|works|lists")

# Pictures

JSONL = "data/captions.jsonl"
FIRST = "data/images/00000.png"
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX", "JPEG2000", "AVIF", "DDS", "SGI")
for n, kind in enumerate(KINDS):
    from PIL import features

    if (kind == "AVIF" and not features.check("avif")) or (kind == "JPEG2000" and not features.check("jpg_2000")):
        continue
    for command in (EXTRACT, TRAIN) if n < 3 else (EXTRACT,):
        case(f"{kind} cut of {command.split()[0]}", command, write(FIRST, picture(kind, 0.6)), ends="works")
for kind, content in {
    "empty": b"", "junk": bytes(range(256)) * 9, "of 10**6 by 10**6": png(10**6, 10**6), "of no size": png(0, 0),
    "of one pixel": png(1, 1, b"\0\1\2\3"),
    "of 2**31": png(2**31 - 1, 2**31 - 1), "bomb": png(20000, 20000, bytes(60001) * 20),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "pickle": b"\x80\x04]\x94.", "html": b"<html>not found</html>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
}.items():  # fmt: skip
    command = (EXTRACT, TRAIN)[len(kind) % 2]
    case(f"picture {kind} of {command.split()[0]}", command, write(FIRST, content), ends="works", memory="of" in kind)
for kind, damage in {"folder": folder_at(FIRST), "pipe": pipe(FIRST), "link to itself": link(FIRST, "00000.png"),
"gone": remove(FIRST),
                     "device": link(FIRST, "/dev/zero")}.items():  # fmt: skip
    command = (EXTRACT, TRAIN)[len(kind) % 2]
    case(f"picture {kind} of {command.split()[0]}", command, damage, ends="works|line")
for kind, name in {"absolute": "/etc/passwd", "climbs": "../../etc/passwd", "url": "http://127.0.0.1:9/a.png", "nul": "a\0b.png",
                   "empty": "", "number": 7, "list": ["a", "b"], "none": None, "mapping": {"bytes": "x"},
                   "odd url": "http://[bad/a.png",
                   "data url": "data:image/png;base64,xx", "file url": "file:///etc/passwd",
                   "long": "x" * 5000}.items():  # fmt: skip
    for command in (EXTRACT, TRAIN):
        case(
            f"image name {kind} of {command.split()[0]}",
            command,
            write(JSONL, line(image=name) + line("images/00001.png")),
            ends="line|works",
        )  # type: ignore[arg-type]

# Data sets

LINES: dict[str, str | bytes] = {
    "empty": "", "spaces": "\n\n \n", "cut": line()[:40], "second line cut": line() + '{"image": "im', "list of numbers": "[1, 2]",
    "number": "7",
    "text": '"x"', "null": "null", "mapping of nothing": "{}", "deep": DEEP, "not utf-8": b'{"image": "\xff\xfe"}\n',
    "utf-16": line().encode("utf-16"),
    "a mark of utf-8": b"\xef\xbb\xbf" + line().encode(), "lone surrogate": line(answer="a \ud800 ring", caption="a \ud800 ring"),
    "NaN id": line(id=float("nan")),
    "huge number": '{"image": "images/00000.png", "answer": "x", "caption": "x", "id": ' + HUGE + "}",
    "same id twice": line(id="a") + line(id="a"),
    "id a list": line(id=[1]), "answer a number": line(answer=7, caption=7), "answer empty": line(answer="", caption=""),
    "answer a list": line(answer=["x"], caption=["x"]), "question a number": line(question=7), "nul in words": line(answer="a\0b",
    caption="a\0b"),
    "long words": line(answer="ring " * 5000, caption="ring " * 5000), "only marks": line(answer="!!! ...", caption="!!! ..."),
    "picture mark in words": line(answer="<image> <image>", question="<image><image>", caption="<image>"),
    "conversations a number": line(conversations=7), "conversations empty": line(conversations=[]), "conversations odd":
    line(conversations=[{"from": "nobody", "value": "x"}]), "messages odd": line(messages=[7]),
    "messages without content": line(messages=[{"role": "user"}]),
    "regions a number": line(regions=7), "regions odd": line(regions=[{"start": 0, "end": 9, "boxes": [[0, 0, 9]]}]),
    "regions huge": line(regions=[{"start": 0, "end": 5, "role": "answer", "boxes": [[0, 0, 1e308, float("inf")]]}]),
    "regions mask": line(regions=[{"start": 0, "end": 5, "role": "answer", "rle": {"size": [10**6, 10**6], "counts": [10**12]}}]),
    "rle negative": line(regions=[{"start": 0, "end": 5, "role": "answer", "rle": {"size": [4, 4], "counts": [-3, 19]}}]),
    "karpathy odd": '{"images": 7}', "karpathy empty": '{"images": []}', "karpathy half": '{"images": [{"split": "train"}]}',
    "coco": '{"annotations": [], "images": []}',
}  # fmt: skip
for n, (kind, content) in enumerate(LINES.items()):
    command = (EXTRACT, TRAIN)[n % 2]
    case(f"lines {kind} of {command.split()[0]}", command, write(JSONL, content), ends="line|works|lists")


def archive(*members: tuple[str, bytes], compress: bool = False, kind: bytes = tarfile.REGTYPE, to: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, to
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(buffer.getvalue()) if compress else buffer.getvalue()


GOOD = picture("PNG")
FILES: dict[str, tuple[str, str | bytes]] = {
    "tar cut": ("a.tar", archive(("a.png", GOOD), ("a.txt", b"a ring"))[:700]),
    "tar empty": ("a.tar", b""),
    "tar of nothing": ("a.tar", archive()),
    "tar junk": ("a.tar", bytes(range(256)) * 20),
    "tar names lead out": ("a.tar", archive(("../../a.png", GOOD), ("../../a.txt", b"a ring"))),
    "tar links": ("a.tar", archive(("a.png", b""), ("a.txt", b""), kind=tarfile.SYMTYPE, to="/etc/passwd")),
    "tar devices": ("a.tar", archive(("a.png", b""), kind=tarfile.CHRTYPE)),
    "tar without captions": ("a.tar", archive(("a.png", GOOD))),
    "tar binary caption": ("a.tar", archive(("a.png", GOOD), ("a.txt", b"\xff\xfe\x00"))),
    "tar.gz": ("a.tar.gz", archive(("a.png", GOOD), ("a.txt", b"a ring"), compress=True)),
    "tar.gz cut": ("a.tar.gz", archive(("a.png", GOOD), ("a.txt", b"a ring"), compress=True)[:60]),
    "parquet empty": ("a.parquet", b""),
    "parquet junk": ("a.parquet", b"PAR1" + bytes(99) + b"PAR1"),
    "csv empty": ("a.csv", ""),
    "csv without columns": ("a.csv", "x,y\n1,2\n"),
    "csv nul": ("a.csv", b"image,caption\n00000.png,\0\n"),
    "csv binary": ("a.csv", bytes(range(256))),
    "csv quotes": ("a.csv", 'image,caption\n"images/00000.png,a ring\n'),
    "csv long field": ("a.csv", "image,caption\nx.png," + "x" * 200_000 + "\n"),
    "csv same column": ("a.csv", "image,image,caption\na.png,b.png,x\n"),
    "tsv": ("a.tsv", "image\tcaption\nimages/00000.png\ta ring\n"),
    "jsonl.gz cut": ("a.jsonl.gz", gzip.compress(line().encode())[:30]),
    "zip": ("a.zip", b"PK\x03\x04junk"),
    "unknown ending": ("a.xyz", "x"),
    "no ending": ("noending", "x"),
    "metadata odd": ("imgs/metadata.csv", "file_name,text\n../../etc/passwd,x\n"),
    "metadata junk": ("imgs/metadata.jsonl", b"\xff\xff"),
}
for kind, (name, content) in FILES.items():
    place = name.split("/")[0]
    case(
        f"data {kind}",
        EXTRACT.replace("data/captions.jsonl", place),
        write(name, content),
        ends="line|lists|works",
        needs=("data",),
    )
    if len(kind) % 3 == 0:
        case(
            f"data {kind} of train",
            TRAIN.replace("data/captions.jsonl", place),
            write(name, content),
            ends="line|works",
            needs=("data",),
        )
for kind, url in {"closed port": "http://127.0.0.1:9/a.jsonl", "bad": "http://[bad", "no host": "http://",
"ftp": "ftp://127.0.0.1:9/a.jsonl",
                  "file": "file:///nothing/a.jsonl", "memory": "memory://a.jsonl", "s3": "s3://no-such/a.jsonl",
                  "chain": "zip://a::b.zip",
                  "hub": "hf://datasets/no/such", "pattern": "'data/*.nothing'", "bad pattern": "'data/[.jsonl'",
                  "hub id": "no/such-set",
                  "data url": "data:text/plain,x", "spaces": "' '", "dots": "...",
                  "port": "http://127.0.0.1:999999/a.jsonl"}.items():  # fmt: skip
    command = (EXTRACT, TRAIN)[len(kind) % 2]
    case(f"url {kind} of {command.split()[0]}", command.replace("data/captions.jsonl", url), needs=("data",))

# Masks and boxes


def coco(**changes: Any) -> str:
    picture = {"id": 1, "file_name": "00000.png", "height": 64, "width": 64}
    mark = {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "bbox": [1, 1, 9, 9],
        "segmentation": [[1, 1, 9, 1, 9, 9]],
        "iscrowd": 0,
        "area": 9,
    }
    whole = {"images": [picture | changes.pop("image", {})], "annotations": [mark | changes.pop("mark", {})],
             "categories": [{"id": 1, "name": "star"}]}  # fmt: skip
    return json.dumps(whole | changes)


def grounding(**changes: Any) -> str:
    entry = {"id": "images/00000.png", "objects": [{"boxes": [[0, 0, 1, 1]]}], "words": [{"start": 2, "end": 7, "object": 0}]}
    return json.dumps(entry | changes) + "\n"


MASKS: dict[str, str | bytes] = {
    "empty": "", "list": "[]", "number": "7", "deep": DEEP, "cut": grounding()[:30], "binary": b"\xff\xfe\0",
    "id a number": grounding(id=7),
    "no such id": grounding(id="nobody"), "objects a number": grounding(objects=7), "objects empty": grounding(objects=[]),
    "words a number": grounding(words=7),
    "object 9": grounding(words=[{"start": 0, "end": 1, "object": 9}]), "object negative": grounding(words=[{"start": 0, "end": 1,
    "object": -1}]),
    "end before start": grounding(words=[{"start": 9, "end": 1, "object": 0}]), "start a text": grounding(words=[{"start": "x",
    "end": 1, "object": 0}]),
    "span too far": grounding(words=[{"start": 0, "end": 10**9, "object": 0}]), "box of three": grounding(objects=[{"boxes": [[0,
    0, 1]]}]),
    "box NaN": grounding(objects=[{"boxes": [[float("nan"), 0, 1, 1]]}]), "box in pixels": grounding(objects=[{"boxes": [[0, 0, 64,
    64]]}]),
    "box upside down": grounding(objects=[{"boxes": [[1, 1, 0, 0]]}]), "mask missing": grounding(objects=[{"mask": "nothing.png"}]),
    "mask leads out": grounding(objects=[{"mask": "../../../etc/passwd"}]), "mask a number": grounding(objects=[{"mask": 7}]),
    "rle huge": grounding(objects=[{"rle": {"size": [10**6, 10**6], "counts": [10**12]}}]),
    "rle short": grounding(objects=[{"rle": {"size": [9, 9], "counts": [1]}}]),
    "rle text": grounding(objects=[{"rle": {"size": [9, 9], "counts": "\x7f\x7f"}}]),
    "rle size a text": grounding(objects=[{"rle": {"size": "x", "counts": [1]}}]),
    "coco": coco(), "coco no images": coco(images=7), "coco no categories": coco(categories=None),
    "coco box of two": coco(mark={"bbox": [1, 2], "segmentation": []}),
    "coco size zero": coco(image={"height": 0}), "coco size huge": coco(image={"height": 10**9, "width": 10**9}),
    "coco size a text": coco(image={"height": "x"}),
    "coco polygon odd": coco(mark={"segmentation": [[1, 2, 3]]}), "coco polygon text": coco(mark={"segmentation": [["x"] * 6]}),
    "coco polygon NaN": coco(mark={"segmentation": [[float("nan")] * 6]}), "coco rle": coco(mark={"segmentation": {"size": [64,
    64], "counts": [1]}, "iscrowd": 1}),
    "coco category unknown": coco(mark={"category_id": 9}), "coco image unknown": coco(mark={"image_id": 9}),
    "coco name a number": coco(categories=[{"id": 1, "name": 7}]),
    "coco id a list": coco(mark={"image_id": [1]}), "coco file_name none": coco(image={"file_name": None}),
}  # fmt: skip
for kind, content in MASKS.items():
    case(f"masks {kind}", MAPS, write("data/grounding.jsonl", content), ends="line|works", memory="huge" in kind)
SENTENCES = "flickr/Sentences/00000.txt"
ANNOTATIONS = "flickr/Annotations/00000.xml"
ENTITY = "A [/EN#1/shapes large yellow star] ."
XML = "<annotation><size><width>64</width><height>64</height></size><object><name>1</name>"
XML += "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
BOMB = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">'
BOMB += "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True))
BOMB += "]><annotation>&i;</annotation>"
for kind, (sentence, xml) in {
    "good": (ENTITY, XML), "no xml": (ENTITY, "x"), "xml cut": (ENTITY, XML[:60]), "xml bomb": (ENTITY, BOMB), "xml reads a file":
    (ENTITY, f'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>{XML.replace("<name>1", "<name>&x;")}'),
    "width a text": (ENTITY, XML.replace(">64<", ">x<", 1)),
    "width zero": (ENTITY, XML.replace(">64<", ">0<", 1)), "box a text": (ENTITY, XML.replace("<xmin>1", "<xmin>x")),
    "no size": (ENTITY, "<annotation/>"),
    "brackets": ("A [/EN#1/shapes large", XML), "binary": ("\udcff\udcfe", XML), "empty": ("", ""), "huge": (ENTITY,
    XML.replace(">64<", f">{HUGE}<")),
}.items():  # fmt: skip
    spoil = both(write(SENTENCES, sentence), write(ANNOTATIONS, xml))
    case(f"flickr {kind}", "evaluate maps store --masks flickr", spoil, ends="line|works", memory=kind == "xml bomb")
case("flickr without annotations", "evaluate maps store --masks flickr", write(SENTENCES, ENTITY))

# A demo's results

RESULTS = "demo/results.json"
for kind, content in {
    "empty": "",
    "cut": '{"answers": ',
    "list": "[]",
    "mapping": "{}",
    "deep": DEEP,
    "NaN": "NaN",
    "binary": b"\xff",
    "number": HUGE,
}.items():
    case(f"results {kind}", REPORT, write(RESULTS, content))
for n, key in enumerate(("answers", "attention", "history", "examples", "teacher", "config", "environment")):
    for kind in ("text", "none", "list", "negative", "mapping")[n % 2 :: 2]:
        case(
            f"results {key} {kind}", REPORT, put(RESULTS, key, value=VALUES[kind]), ends="line|works", writes=("demo/report.html",)
        )
for kind, spoil in {
    "history of texts": put(RESULTS, "history", "plain", value=["x"]), "steps of texts": put(RESULTS, "history", "plain", 0,
    "step", value="x"),
    "no examples": put(RESULTS, "examples", value=[]), "maps of texts": put(RESULTS, "examples", 0, "questions", 0, "words", 0,
    "maps", "plain", value=["x"]),
    "maps too large": put(RESULTS, "examples", 0, "questions", 0, "words", 0, "maps", "plain", value=[[1.0] * 999]),
    "picture negative":
    put(RESULTS, "examples", 0, "picture", value=-1), "picture huge": put(RESULTS, "examples", 0, "picture", value=10**12),
    "markup": put(RESULTS, "examples", 0, "questions", 0, "text", value="<script>alert(1)</script>"), "mean NaN":
    put(RESULTS, "answers", "clutter", "all", "first", "mean", value=float("nan")), "alignment nothing": put(RESULTS, "config",
    "alignment", value=None),
}.items():  # fmt: skip
    case(f"results {kind}", REPORT, spoil, ends="line|works", writes=("demo/report.html",))
case("report.html a folder", REPORT, folder_at("demo/report.html"))
case("report.html linked", REPORT, link("demo/report.html", "../mine"), ends="works", writes=("demo/report.html",))

# Sizes

case("batch of 10**9", f"{EXTRACT} --batch-size 1000000000", ends="line|works", memory=True)
case("batch of 10**9 of train", f"{TRAIN} --batch-size 1000000000", ends="line|works", memory=True)
case("map of 10**6", f"{EXTRACT.replace('--map-size 8', '--map-size 1000000')}", memory=True)
case("image of 10**6", f"{EXTRACT} --image-size 1000000", memory=True)
case("rank of 10**9", f"{TRAIN} --lora-rank 1000000000", memory=True)
case("scenes of 10**9", f"{EVALUATE} --scenes 1000000000".replace("--scenes 1 ", ""), memory=True)
case("hidden channels of 10**9", f"{ALIGNED} --aligner sim --set alignment.hidden_channels=1000000000", memory=True)
case("grid of 10**9", f"{ALIGNED} --set alignment.max_grid=1000000000", ends="line|works", memory=True)
case(
    "parallel width of 10**9",
    f"{ALIGNED} --set alignment.aggregation=parallel --set alignment.parallel_width=1000000000",
    memory=True,
)
case("hidden size of 10**9", EVALUATE, put(STUDENT, "text_config", "hidden_size", value=10**9), memory=True)
case("vocabulary of 10**12", TRAIN, put(STUDENT, "text_config", "vocab_size", value=10**12), memory=True)
case("steps of 10**12 and no data", f"{TRAIN} --steps 1000000000000", write(JSONL, ""))
case("shard of 10**12", f"{EXTRACT} --set shard_size=1000000000000", ends="works")
case("threads of 10**9", f"{EXTRACT} --set threads=1000000000", ends="line|works", memory=True)
case("safetensors header of 10**9", EVALUATE, write("student/model.safetensors", header(10**9, bytes(10**6))), memory=True)

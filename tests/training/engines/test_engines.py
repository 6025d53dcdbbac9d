"""Every engine with two processes on the CPU, by its shipped config file: the losses of one process with the same batches, and a
run that is killed continues exactly. `worker.py` asserts that it is the engine's doing.

One launch per engine trains all its runs. SIGKILL ends the processes of the first run in its middle; then others call the same
`fine_tune`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from lavender.data.samples import read_samples
from lavender.miniworld import write_dataset
from lavender.training.train import load_student
from recipes.student import make_model

from ..test_train import write_targets

CONFIGS = Path(__file__).parents[3] / "examples/engines"
WORKER = Path(__file__).with_name("worker.py")
GLOBAL_BATCH = 8
SAVE_STEPS = 5
"""Not the end of an epoch, which has two steps."""
KILL_AFTER = 7
"""The step at whose end the first run is killed: two steps are lost."""
# By name: settings of TrainingConfig beside the common ones.
RUNS = {
    "full": {"steps": 10},
    "lora": {"steps": 4, "lora_rank": 4, "aligner_steps": 2, "aligner_learning_rate": 1e-3},
    "sparse": {"steps": 6},
    "chosen": {"steps": 4},
    "accumulated": {"steps": 6, "arguments": {"gradient_accumulation_steps": 2}},
    "checkpointed": {"steps": 4, "gradient_checkpointing": True},
    "half": {"steps": 6},
    "cut": {"steps": 3, "max_length": 96, "arguments": {"train_sampling_strategy": "sequential"}},
    "skipped": {"steps": 3, "arguments": {"train_sampling_strategy": "sequential"}},
    "poisoned": {"steps": 3, "save_steps": 1, "arguments": {"train_sampling_strategy": "sequential"}},
    "wild": {"steps": 2, "save_steps": 1, "learning_rate": 1e38, "warmup_steps": 0},
    "lost": {"steps": 3, "save_steps": 1, "arguments": {"save_total_limit": 3}},
}
ENGINES = {
    "ddp": ("full", "lora", "sparse", "chosen"),
    "zero2": ("full", "sparse", "chosen"),
    "zero3": ("full", "lora", "sparse", "chosen"),
    "fsdp2": ("full", "lora", "sparse", "chosen"),
}
ALIGNMENTS = {"chosen": {"heads": "best:3", "rows": "both", "until": 0.5}}
DATA = {"cut": "long.jsonl", "skipped": "bad.jsonl"}
HISTORY = ("loss", "language_loss", "alignment_loss", "matched_words")


@pytest.fixture(scope="module")
def world(scenes, processor, tmp_path_factory):
    """A folder with a student of two layers, sixteen samples, targets for all of them and for a few."""
    folder = tmp_path_factory.mktemp("engines")
    config = make_model(processor).config
    for part, layers in ((config.vision_config, 1), (config.text_config, 2)):
        part.num_hidden_layers, part.hidden_size, part.intermediate_size = layers, 64, 128
    config.text_config.head_dim = 16
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder / "student")
    processor.save_pretrained(folder / "student")
    data = write_dataset(scenes[:16], folder / "data")
    ids = [sample.id for sample in read_samples(data)]
    entries = [*enumerate(json.loads(line) for line in data.read_text().splitlines())]
    # Without label tokens, by `max_length`: the first step's batch of the second of two processes, and all of the second step.
    long = [entry | ({"question": "what color is it? " * 9} if n >= 4 else {}) for n, entry in entries]
    # Skipped: the same batch, and two samples of the second step.
    bad = [entry | ({"image": "bad.png", "id": f"bad {n}"} if 4 <= n < 10 else {}) for n, entry in entries]
    (folder / "data/bad.png").write_bytes(b"no picture")
    for name, lines in (("long", long), ("bad", bad)):
        (folder / f"data/{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    write_targets(folder / "targets", scenes[:16], ids)
    write_targets(folder / "few_targets", scenes[:5], ids[:5])
    return folder


@pytest.fixture(scope="module")
def one(world):
    """The folder of one process's runs: those of `ENGINES`."""
    launch([sys.executable], world, "one", [run("one", name) for name in ("full", "lora", "sparse", "chosen")])
    return world / "one"


@pytest.fixture(scope="module")
def lacking(world):
    """The folder of one process's runs with samples that lack label tokens."""
    launch([sys.executable], world, "one", [run("one", "cut"), run("one", "skipped")])
    return world / "one"


@pytest.fixture(scope="module")
def more(world):
    """The same of the runs that are not in `ENGINES`."""
    launch([sys.executable], world, "one", [run("one", name) for name in ("accumulated", "checkpointed", "half")])
    return world / "one"


def run(engine, name, **settings):
    """A run of the worker's: `name` is one of RUNS, maybe with a suffix."""
    training = RUNS[name.split("-")[0]]
    processes = 1 if engine == "one" else 2
    micro_batches = training.get("arguments", {}).get("gradient_accumulation_steps", 1)
    batch = 2 if name == "sparse" else GLOBAL_BATCH
    common = {"learning_rate": 5e-4, "warmup_steps": 2, "save_steps": SAVE_STEPS, "lora_rank": 0, "lora_dropout": 0.0}
    derived = {"batch_size": batch // processes // micro_batches}
    if name == "half" and engine != "one":
        derived["arguments"] = {"bf16": True}
    return {"name": name, "training": common | derived | training | settings, "alignment": ALIGNMENTS.get(name, {})}


def launch(command, world, engine, runs):
    for one_run in runs:
        targets = "few_targets" if one_run["name"] == "sparse" else "targets"
        one_run |= {"out": str(world / engine / one_run["name"]), "targets": str(world / targets)}
        one_run["data"] = str(world / "data" / DATA.get(one_run["name"], "captions.jsonl"))
    settings = world / f"{engine}.json"
    settings.write_text(json.dumps({"engine": engine, "model": str(world / "student"), "runs": runs}))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [*command, str(WORKER), str(settings)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:]


def accelerate(engine):
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{engine}.yaml")),
        *("--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no"),
        *(("--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer,CLIPEncoderLayer") if engine == "fsdp2" else ()),
    ]


def history(folder):
    return json.loads((folder / "history.json").read_text())


def differences(folder, reference):
    ours, theirs = history(folder), history(reference)
    assert len(ours) == len(theirs)
    return torch.tensor([[abs(a[key] - b[key]) for key in HISTORY] for a, b in zip(ours, theirs, strict=True)])


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # Softmax and z-score do not see these: their gradient is rounding, which AdamW blows up to whole steps.
        if not name.endswith(("k_proj.bias", "aligner.blocks.9.bias")):
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one_and_a_killed_run_continues_exactly(engine, world, one):
    names, out = ENGINES[engine], world / engine
    killed = run(engine, "full-killed") | {"kill_after": KILL_AFTER}
    launch(accelerate(engine), world, engine, [killed, *(run(engine, name) for name in names)])
    for name in names:
        assert_trained_as_one(out, one, name)
    if "lora" in names:
        assert differences(out / "lora/first_stage", one / "lora/first_stage").max() < 1e-5
        assert_same_weights(*(load_file(f / "lora/adapter/adapter_model.safetensors") for f in (out, one)))
    assert_same_weights(*(load_student(f / "full/model")[0].state_dict() for f in (out, one)))
    # One process chooses for all; and lambda ends for all at once.
    chosen = [json.loads((folder / "chosen/heads.json").read_text())["config"] for folder in (out, one)]
    assert chosen[0] == chosen[1]
    assert [entry["alignment_weight"] for entry in history(out / "chosen")] == [2, 2, 0, 0]
    # Means over each process's own words would have been others; and some batches had none.
    ours, theirs = words_of_ranks(out / "full")
    assert all(a != b for a, b in zip(ours[:2], theirs[:2], strict=True))
    assert any(min(pair) == 0 < max(pair) for pair in zip(*words_of_ranks(out / "sparse"), strict=True))

    # The killed run continued from its checkpoint, and ended as the undisturbed one.
    num_steps = RUNS["full"]["steps"]
    assert [len(words) for words in words_of_ranks(out / "full")] == [num_steps] * 2
    assert [len(words) for words in words_of_ranks(out / "full-killed")] == [num_steps - SAVE_STEPS] * 2
    assert history(out / "full-killed") == history(out / "full")
    for file in ("model/model.safetensors", "aligner.safetensors"):
        undisturbed, resumed = (load_file(out / name / file) for name in ("full", "full-killed"))
        assert undisturbed.keys() == resumed.keys()
        assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())


def words_of_ranks(folder):
    """The matched words of every step, by process."""
    return [json.loads((folder / f"words.{rank}.json").read_text()) for rank in (0, 1)]


def assert_trained_as_one(out, one, name):
    difference = differences(out / name, one / name).max()
    if name == "half":
        assert 1e-4 < difference < 0.05
        return
    assert difference < 1e-5, (name, difference)
    assert_same_weights(*(load_file(folder / name / "aligner.safetensors") for folder in (out, one)))


@pytest.mark.full
def test_ddp_accumulates_checkpoints_and_halves_as_one_process(world, more):
    names = ("accumulated", "checkpointed", "half")
    launch(accelerate("ddp"), world, "ddp", [run("ddp", name) for name in names])
    for name in names:
        assert_trained_as_one(world / "ddp", more, name)


@pytest.mark.full
@pytest.mark.parametrize(("stage", "name"), [(2, "accumulated"), (3, "half")])
def test_deepspeed_by_its_own_config_file(stage, name, world, more):
    engine = f"zero{stage}"
    arguments = run(engine, name)["training"]["arguments"] | {"deepspeed": str(CONFIGS / f"{engine}.json")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch(command, world, engine, [run(engine, f"{name}-json", arguments=arguments)])
    difference = differences(world / engine / f"{name}-json", more / name)
    assert difference.max() < (0.05 if name == "half" else 1e-5)


RANKS_FILE = {
    "ddp": "rng_state_1.pth",
    "zero2": "global_step2/*zero_pp_rank_1_*optim_states.pt",
    "zero3": "global_step2/zero_pp_rank_1_*model_states.pt",
    "fsdp2": "optimizer_0/__1_0.distcp",
}
"""What the second process alone writes of the checkpoint of step 2."""


@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(name, marks=pytest.mark.full) for name in ("zero2", "zero3", "fsdp2"))])
def test_what_befalls_one_process_stops_or_skips_all_alike(engine, world, lacking):
    out = world / engine
    sample = read_samples(world / "data/captions.jsonl")[13].id  # in the second step, of the second process
    runs = [
        run(engine, "cut"),
        run(engine, "skipped"),
        run(engine, "poisoned") | {"poison": sample},
        run(engine, "poisoned-refused") | {"refuse": sample},
        run(engine, "wild"),
    ]
    launch(accelerate(engine), world, engine, runs)
    # Batches without label tokens: of one process, then of all.
    assert [entry["loss"] == 0 for entry in history(out / "cut")] == [False, True, False]
    assert [entry["samples_skipped"] for entry in history(out / "skipped")] == [4, 2, 4]
    for name in ("cut", "skipped"):
        assert differences(out / name, lacking / name).max() < 1e-5
        assert_same_weights(*(load_student(folder / name / "model")[0].state_dict() for folder in (out, lacking)))
    for name, message in (
        ("poisoned", f"the loss of step 2 is not finite \\(process 1: loss nan, .*'{sample}'.*checkpoint-1"),
        ("poisoned-refused", f"DataError: sample '{sample}' is refused$"),
        ("wild", r"weights are not finite after step 1 \(process 0: .*process 1: .*no checkpoint was written"),
    ):
        errors = [(out / name / f"error.{rank}").read_text() for rank in (0, 1)]
        assert errors[0] == errors[1]
        assert re.search(message, errors[0]), errors[0]
        assert not (out / name / "history.json").exists()
    assert [path.name for path in (out / "poisoned/checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not [*(out / "wild/checkpoints").glob("checkpoint-*")]


@pytest.mark.full
@pytest.mark.parametrize("engine", ENGINES)
def test_all_processes_continue_from_the_checkpoint_before_if_a_file_of_one_is_missing(engine, world):
    out = world / engine
    lost = ["checkpoints/checkpoint-3", f"checkpoints/checkpoint-2/{RANKS_FILE[engine]}"]
    # The last one was killed before it wrote its results.
    runs = [run(engine, "lost") | {"lose": lost}, run(engine, "lost-results") | {"lose": []}, run(engine, "lost-whole")]
    launch(accelerate(engine), world, engine, runs)
    assert [path.name for path in (out / "lost/checkpoints/damaged").iterdir()] == ["checkpoint-2"]
    for name in ("lost", "lost-results"):
        assert history(out / name) == history(out / "lost-whole")
        for file in ("model/model.safetensors", "aligner.safetensors"):
            whole, continued = (load_file(out / run_name / file) for run_name in ("lost-whole", name))
            assert whole.keys() == continued.keys()
            assert all(torch.equal(value, continued[key]) for key, value in whole.items())


@pytest.mark.full
@pytest.mark.parametrize("engine", ENGINES)
def test_all_processes_go_on_where_one_died_while_it_wrote_or_was_asked_to_end(engine, world):
    """The first is killed while it puts a checkpoint onto the disk; the last one alone gets a signal in step 3."""
    out = world / engine
    names = {"full-dies": {"die_at": 30}, "full-signal": {"signal_after": 3}}
    launch(accelerate(engine), world, engine, [*(run(engine, name) | how for name, how in names.items()), run(engine, "full-end")])
    said = {(out / f"full-signal/stopped.{rank}").read_text() for rank in (0, 1)}
    assert len(said) == 1
    assert re.match(r"SIGTERM ended the training after step ([34]): checkpoint-\1 is written; the same command", *said)
    for name in names:
        assert history(out / name) == history(out / "full-end")
        for file in ("model/model.safetensors", "aligner.safetensors"):
            whole, disturbed = (load_file(out / run_name / file) for run_name in ("full-end", name))
            assert whole.keys() == disturbed.keys()
            assert all(torch.equal(value, disturbed[key]) for key, value in whole.items())
        assert not [*(out / name).rglob("unfinished")]

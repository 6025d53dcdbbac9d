"""Students as users of transformers and PEFT compose them: equal to the definition, or refused by a `LavenderError`; nothing else.

`LAVENDER_COMPOSITIONS=5000 pytest tests/students/test_compositions.py -m full` runs a longer campaign, another one each time.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from .compositions import AXES, Composition, check
from .zoo import _commit

NUM_FAST, NUM_FULL = 60, 600
CAMPAIGN = int(os.environ.get("LAVENDER_COMPOSITIONS", "0"))
FLEX = "flex_attention"
"""PyTorch compiles it on a CPU, for seconds each, and has no gradient there."""


@st.composite
def compositions(draw: st.DrawFn) -> Composition:
    """A few choices that are not the plainest, and their values: what is refused by one of many would hide the others."""
    axes = draw(st.lists(st.sampled_from([axis for axis in AXES if axis != "student"]), min_size=1, max_size=5, unique=True))
    values = {axis: draw(st.sampled_from([value for value in AXES[axis][1:] if value != FLEX])) for axis in axes}
    return Composition(student=draw(st.sampled_from(AXES["student"])), **values)


def run(composition: Composition, outcomes: Counter[str]) -> None:
    outcomes[check(composition).split(":")[0]] += 1


def campaign(count: int) -> Counter[str]:
    """Outcomes of `count` compositions, the same ones for a commit unless the environment asks for more."""
    outcomes: Counter[str] = Counter()
    choose = settings(
        max_examples=CAMPAIGN or count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    fixed = (lambda test: test) if CAMPAIGN else seed(_commit())
    choose(fixed(given(compositions())(lambda composition: run(composition, outcomes))))()
    return outcomes


@pytest.mark.parametrize(
    "student", [AXES["student"][0], *(pytest.param(name, marks=pytest.mark.full) for name in AXES["student"][1:])]
)
@pytest.mark.parametrize("axis", [axis for axis in AXES if axis != "student"])
def test_each_choice_alone(student, axis):
    """Everything else is plain; so that what is not refused here is a choice that works."""
    for value in AXES[axis]:
        if value == FLEX:
            continue
        check(replace(Composition(student=student), **{axis: value}))


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        # Nothing of the text tower trains: autograd that is off in its layers still takes the prompt's gradient away.
        ({"peft": "prompt", "checkpointing": "reentrant"}, "'use_reentrant': False"),
        ({"peft": "prompt", "attention": "flash_attention_2", "packing": "lengths_alone"}, "virtual tokens"),
        (
            {
                "peft": "prefix",
                "attention": "flash_attention_2",
                "padding": "right",
                "checkpointing": "non_reentrant",
                "content": "two_pictures",
            },
            "which drops the prefix",
        ),
        ({"attention": "sdpa", "packing": "cu_seq_lens"}, "with cu_seq_lens_q"),
    ],
)
def test_what_cannot_be_followed_is_refused(choices, reason):
    outcome = check(Composition(**choices))
    assert outcome.startswith("refused")
    assert reason in outcome


def test_compositions_are_their_definition_or_refused():
    outcomes = campaign(NUM_FAST)
    assert outcomes["equal"] > NUM_FAST / 4, outcomes


@pytest.mark.full
def test_more_compositions_are_their_definition_or_refused():
    outcomes = campaign(NUM_FULL)
    print(dict(outcomes))
    assert outcomes["equal"] > NUM_FULL / 4, outcomes


@pytest.mark.full
@pytest.mark.parametrize("student", ["llava", "qwen2_vl"])  # PyTorch's kernel for mllama's cross-attention frees memory twice
@pytest.mark.parametrize("packing", ["none", "positions"])
def test_flex_attention_is_its_definition(student, packing):
    torch._dynamo.reset()  # for shapes that it takes to change, the CPU's kernel does not compile
    assert check(Composition(student=student, attention=FLEX, packing=packing)) == "equal"

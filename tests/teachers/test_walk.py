"""Every pipeline of diffusers that can be built here: its picture is the same with and without the patch, and either its maps equal
an independent computation, or it is refused in so many words.
"""

from __future__ import annotations

import pytest

from .walk import committed_table, table, unread, walk
from .walked import WALK

OFTEN = [
    "StableDiffusionPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionSAGPipeline/unguided",
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionAttendAndExcitePipeline",
    "TextToVideoZeroPipeline",
    "KolorsPipeline",
    "StableDiffusion3Pipeline/skipped layers",
    "FluxControlNetPipeline",
    "FluxKontextPipeline",
    "ChromaPipeline",
    "Flux2Pipeline",
    "QwenImagePipeline",
    "SanaPipeline/with an instruction",
    "Lumina2Pipeline",
    "AuraFlowPipeline",
    "CogView4Pipeline",
    "PixArtSigmaPAGPipeline",
    "WanPipeline/two transformers",
    "HunyuanVideoPipeline",
    "LTXConditionPipeline",
]
"""One of every kind; the others run with what is marked `full`."""


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.full) for name in sorted({*WALK, *OFTEN})]
)
def test_the_picture_is_the_same_and_its_maps_are_right_or_refused(name):
    outcome = walk(name)
    stated = f"| {name.replace('/', ', ')} | {outcome.denoiser} | {'read' if outcome.when is None else 'refused by '}"
    assert stated in committed_table()


@pytest.mark.full
def test_the_table_of_the_documentation_is_what_the_walk_gives():
    assert committed_table() == table()


@pytest.mark.full
def test_classes_whose_denoiser_is_not_read_are_refused_by_its_name():
    outcomes = unread()
    assert len(outcomes) > 80
    for name, outcome in outcomes.items():
        assert outcome.denoiser in outcome.error or name in outcome.error or "no attention module" in outcome.error, name

"""Tiny models that see a picture as tiles and as a whole.

Cohere2 Vision, Llama 4 and LFM2-VL have image processors for torchvision only, which is not needed elsewhere: the stand-ins below
do the same on arrays and lay out their tiles by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import (
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    BatchFeature,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionProcessor,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    Lfm2VlForConditionalGeneration,
    Lfm2VlProcessor,
    Llama4ForConditionalGeneration,
    Llama4Processor,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.processing_utils import ImagesKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from lavender.testing.student import Student, seeded

from . import tokenizer, with_video

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TILE = {"height": 32, "width": 32}


def built(
    model: type[PreTrainedModel], tok: PreTrainedTokenizerFast, text: dict[str, Any], vision: dict[str, Any], **settings: Any
) -> PreTrainedModel:
    tokens = {"vocab_size": len(tok), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = model.config_class(text_config={**TEXT, **tokens, **text}, vision_config={**VISION, **vision}, **settings)
    return seeded(lambda: model(config))


def internvl() -> Student:
    tok = tokenizer(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>")
    processor = with_video(
        InternVLProcessor,
        BaseVideoProcessor,
        image_processor=GotOcr2ImageProcessorPil(size=TILE, max_patches=6),
        tokenizer=tok,
        image_seq_length=4,
    )
    model = built(
        InternVLForConditionalGeneration,
        tok,
        {"model_type": "qwen2"},
        {"image_size": 32, "patch_size": 8},
        image_token_id=tok.context_image_token_id,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return Student(model, processor, "<IMG_CONTEXT>")


def aya_vision() -> Student:
    marks = {"start": "<|START_OF_IMG|>", "end": "<|END_OF_IMG|>", "tile": "TILE", "whole": "TILE_GLOBAL"}
    tok = tokenizer(image_token="<image>", patch_token="<|IMG_PATCH|>", **{f"{name}_token": token for name, token in marks.items()})
    processor = AyaVisionProcessor(
        image_processor=GotOcr2ImageProcessorPil(size=TILE, max_patches=6),
        tokenizer=tok,
        patch_size=8,
        img_size=32,
        downsample_factor=2,
    )
    model = built(
        AyaVisionForConditionalGeneration,
        tok,
        {"model_type": "cohere2"},
        {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
        image_token_index=tok.patch_token_id,
        downsample_factor=2,
    )
    return Student(model, processor, "<image>")


class CohereImages(GotOcr2ImageProcessorPil):
    """Stands in for `Cohere2VisionImageProcessor`, which cuts pictures in the same way but chooses another canvas."""

    crop_to_patches = True
    patch_size = 2


def cohere2_vision() -> Student:
    tok = tokenizer(image_token="<image>", boi_token="<img>", eoi_token="</img>", img_line_break_token="<br>")
    processor = Cohere2VisionProcessor(image_processor=CohereImages(size=TILE, max_patches=6), tokenizer=tok)
    model = built(
        Cohere2VisionForConditionalGeneration,
        tok,
        {"model_type": "cohere2"},
        {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
        image_token_id=tok.image_token_id,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    return Student(model, processor, "<image>")


def idefics3() -> Student:
    tok = tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 32}),
        tokenizer=tok,
        image_seq_len=4,
    )
    return Student(_idefics3(Idefics3ForConditionalGeneration, processor), processor, "<image>")


def smolvlm() -> Student:
    tok = tokenizer("<end_of_utterance>", image_token="<image>", fake_image_token="<fake>", global_image_token="<global-img>")
    # Asked for when the processor is built, needed for videos only.
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    processor = with_video(
        SmolVLMProcessor,
        BaseVideoProcessor,
        image_processor=SmolVLMImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 32}),
        tokenizer=tok,
        image_seq_len=4,
    )
    return Student(_idefics3(SmolVLMForConditionalGeneration, processor), processor, "<image>")


def _idefics3(model: type[PreTrainedModel], processor: Any) -> PreTrainedModel:
    return built(
        model,
        processor.tokenizer,
        {"model_type": "llama"},
        {"image_size": 32, "patch_size": 8},
        image_token_id=processor.image_token_id,
        scale_factor=2,
        pad_token_id=0,
    )


def find_supported_resolutions(max_num_chunks: int, patch_size: SizeDict) -> list[tuple[int, int]]:
    side = patch_size["height"]
    grids = [(rows, n // rows) for n in range(max_num_chunks, 0, -1) for rows in range(1, n + 1) if n % rows == 0]
    return [(rows * side, columns * side) for rows, columns in grids]


def get_best_fit(
    image_size: tuple[int, int], possible_resolutions: torch.Tensor, resize_to_max_canvas: bool = False
) -> torch.Tensor:
    scales = [min(height / image_size[0], width / image_size[1]) for height, width in possible_resolutions.tolist()]
    enough = [scale for scale in scales if scale >= 1]
    chosen = (max if resize_to_max_canvas else min)(enough) if enough else max(scales)
    return min((size for size, scale in zip(possible_resolutions, scales, strict=True) if scale == chosen), key=torch.prod)


def get_max_res_without_distortion(image_size: tuple[int, int], target_size: tuple[int, int]) -> tuple[int, int]:
    scale = min(target / side for target, side in zip(target_size, image_size, strict=True))
    height, width = (min(math.floor(side * scale), target) for target, side in zip(target_size, image_size, strict=True))
    return height, width


def cut(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """[C, H, W] -> [pieces, C, height, width], row by row."""
    channels, rows, columns = len(image), image.shape[1] // height, image.shape[2] // width
    return image.reshape(channels, rows, height, columns, width).transpose(1, 3, 0, 2, 4).reshape(-1, channels, height, width)


class Llama4Images(PilBackend):
    """Stands in for `Llama4ImageProcessor`: its layout functions are the three above."""

    size = TILE
    resample = PILImageResampling.BILINEAR
    max_patches = 6
    resize_to_max_canvas = False

    def _preprocess(self, images: list[np.ndarray], size: SizeDict, resample: Any, return_tensors: Any, **_: Any) -> BatchFeature:
        tiles: list[np.ndarray] = []
        ratios: list[list[int]] = []
        for image in images:
            shape = image.shape[-2:]
            canvas = get_best_fit(shape, torch.tensor(find_supported_resolutions(self.max_patches, size))).tolist()
            frame = [min(max(a, size.height), b) for a, b in zip(shape, canvas, strict=True)]
            height, width = get_max_res_without_distortion(shape, frame)
            fitted = self.resize(image, SizeDict(height=height, width=width), resample=resample)
            tiles.extend(cut(np.pad(fitted, ((0, 0), (0, canvas[0] - height), (0, canvas[1] - width))), size.height, size.width))
            ratios.append([canvas[0] // size.height, canvas[1] // size.width])
            if math.prod(ratios[-1]) > 1:
                tiles.append(self.resize(image, size, resample=resample))
        pixels = np.stack(tiles).astype(np.float32) / 127.5 - 1
        return BatchFeature({"pixel_values": pixels, "aspect_ratios": ratios}, tensor_type=return_tensors)


def llama4() -> Student:
    names = ("image", "patch", "image_start", "image_end", "tile_x_separator", "tile_y_separator")
    tok = tokenizer(**{f"{name}_token": f"<|{name}|>" for name in names})
    processor = Llama4Processor(image_processor=Llama4Images(), tokenizer=tok, patch_size=8)
    model = built(
        Llama4ForConditionalGeneration,
        tok,
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": 512,
            # The last layer sees everything, without rotary embeddings.
            "no_rope_layers": [1, 0],
        },
        {
            "image_size": 32,
            "patch_size": 8,
            # Pixel shuffling makes four patches one of four times the width.
            "intermediate_size": 128,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
        image_token_index=tok.patch_token_id,
    )
    return Student(model, processor, "<|image|>")


def minicpmv4_6() -> Student:
    names = ("image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end")
    tok = tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>", **{f"{name}_token": f"<{name}>" for name in names})
    images = MiniCPMV4_6ImageProcessorPil(scale_resolution=48, patch_size=4, max_slice_nums=6)
    processor = with_video(MiniCPMV4_6Processor, Frames, image_processor=images, tokenizer=tok)
    model = built(
        MiniCPMV4_6ForConditionalGeneration,
        tok,
        {
            # Linear attention, then softmax attention.
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 1.0,
            },
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        {"image_size": 48, "patch_size": 4},
        insert_layer_id=0,
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
    )
    return Student(model, processor, "<|image_pad|>")


class Frames(BaseVideoProcessor):
    """Stands in for MiniCPM-V's video processor, of which the processor reads these settings."""

    slice_mode = True
    downsample_mode = "16x"


class Lfm2ImagesKwargs(ImagesKwargs, total=False):
    return_row_col_info: bool


class Lfm2Images(PilBackend):
    """Stands in for `Lfm2VlImageProcessor`, with methods for the layout of the same names."""

    size = TILE
    resample = PILImageResampling.BILINEAR
    valid_kwargs = Lfm2ImagesKwargs
    do_image_splitting = use_thumbnail = True
    downsample_factor = 2
    encoder_patch_size = 8
    tile_size = 32
    min_tiles, max_tiles = 2, 6
    min_image_tokens, max_image_tokens = 2, 9
    max_pixels_tolerance = 2.0

    def smart_resize(
        self, height: int, width: int, downsample_factor: int, min_image_tokens: int, max_image_tokens: int, encoder_patch_size: int
    ) -> tuple[int, int]:
        pixels = encoder_patch_size * downsample_factor
        rows, columns = (max(1, round(side / pixels)) for side in (height, width))
        shrink = math.sqrt(max_image_tokens * pixels**2 / (height * width))
        grow = math.sqrt(min_image_tokens * pixels**2 / (height * width))
        if rows * columns > max_image_tokens:
            rows, columns = (max(1, math.floor(side * shrink / pixels)) for side in (height, width))
        elif rows * columns < min_image_tokens:
            rows, columns = (math.ceil(side * grow / pixels) for side in (height, width))
        return columns * pixels, rows * pixels

    def _is_image_too_large(
        self,
        height: int,
        width: int,
        max_image_tokens: int,
        encoder_patch_size: int,
        downsample_factor: int,
        max_pixels_tolerance: float,
    ) -> bool:
        pixels = encoder_patch_size * downsample_factor
        return math.prod(round(side / pixels) for side in (height, width)) > max_image_tokens * max_pixels_tolerance

    def _get_grid_layout(self, height: int, width: int, min_tiles: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
        grids = [(w, h) for w in range(1, max_tiles + 1) for h in range(1, max_tiles + 1) if min_tiles <= w * h <= max_tiles]
        return min(grids, key=lambda grid: (abs(width / height - grid[0] / grid[1]), math.prod(grid)))

    def _preprocess(self, images: list[np.ndarray], resample: Any, return_tensors: Any, **_: Any) -> BatchFeature:
        patch, limits = self.encoder_patch_size, (self.max_image_tokens, self.encoder_patch_size, self.downsample_factor)
        pieces: list[np.ndarray] = []
        data: dict[str, list[Any]] = {"image_rows": [], "image_cols": [], "image_sizes": []}
        for image in images[0] if isinstance(images[0], list) else images:
            height, width = image.shape[-2:]
            new_width, new_height = self.smart_resize(height, width, self.downsample_factor, self.min_image_tokens, *limits[:2])
            columns, rows = 1, 1
            if self._is_image_too_large(height, width, *limits, self.max_pixels_tolerance):
                columns, rows = self._get_grid_layout(height, width, self.min_tiles, self.max_tiles, self.tile_size)
                canvas = SizeDict(height=rows * self.tile_size, width=columns * self.tile_size)
                pieces.extend(cut(self.resize(image, canvas, resample=resample), self.tile_size, self.tile_size))
            pieces.append(self.resize(image, SizeDict(height=new_height, width=new_width), resample=resample))
            for name, value in zip(data, (rows, columns, [new_height, new_width]), strict=True):
                data[name].append(value)
        patches = [cut(piece, patch, patch).transpose(0, 2, 3, 1).reshape(-1, 3 * patch * patch) / 127.5 - 1 for piece in pieces]
        longest = max(len(p) for p in patches)
        pixels = np.stack([np.pad(p, ((0, longest - len(p)), (0, 0))) for p in patches]).astype(np.float32)
        mask = np.stack([np.arange(longest) < len(p) for p in patches]).astype(np.int64)
        shapes = [[piece.shape[1] // patch, piece.shape[2] // patch] for piece in pieces]
        values = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes, **data}
        return BatchFeature(values, tensor_type=return_tensors)


def lfm2_vl() -> Student:
    places = [f"img_row_{row}_col_{column}" for row in range(1, 7) for column in range(1, 7) if row * column <= 6]
    names = ("image_start", "image_end", "img_thumbnail", *places)
    tok = tokenizer(image_token="<image>", **{f"{name}_token": f"<|{name}|>" for name in names})
    processor = Lfm2VlProcessor(image_processor=Lfm2Images(), tokenizer=tok)
    model = built(
        Lfm2VlForConditionalGeneration,
        tok,
        # A convolution, then attention.
        {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
        {"model_type": "siglip2_vision_model", "patch_size": 8, "num_patches": 36},
        image_token_id=tok.image_token_id,
        projector_hidden_size=32,
        downsample_factor=2,
    )
    return Student(model, processor, "<image>")


STUDENTS: dict[str, Callable[[], Student]] = {
    "internvl": internvl,
    "aya_vision": aya_vision,
    "cohere2_vision": cohere2_vision,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "llama4": llama4,
    "minicpmv4_6": minicpmv4_6,
    "lfm2_vl": lfm2_vl,
}

"""`lavender doctor`: what lavender finds in a model or on a machine, what it can do with it, and what
is missing.

The machine is examined even if torch is not installed: functions import what needs torch.
"""

from __future__ import annotations

import ctypes
import json
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import LavenderError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

_NEEDED = ("numpy", "pillow", "safetensors", "transformers")
_OPTIONAL = {
    "diffusers": ("extract", "`lavender extract` and teachers"),
    "peft": ("train", "training with LoRA"),
    "accelerate": ("train", "training"),
    "datasets": ("train", "training, and data sets of the hub"),
    "deepspeed": ("deepspeed", "training under DeepSpeed"),
}
"""The extra that installs each package, and what needs it."""
_WIDTH = 64
"""The head width for which a machine's kernels are reported."""


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis: a topic, the result, and what to do if something is missing."""

    topic: str
    result: str
    remedy: str = ""


def examine(model: str | Path | Any) -> list[Finding]:
    """Reports what lavender finds in a model's structure. Loads no weights.

    Args:
        model: a transformers image-text-to-text model or a diffusers pipeline: a folder, a hub id, or
            a loaded one.

    Raises:
        ModelError: there is no such model, or it is of neither kind.
    """
    from torch import nn

    if isinstance(model, nn.Module):
        return list(_examine_student(model, None))
    if not isinstance(model, str | Path):
        from .teachers.patch import denoisers_of

        return list(_examine_teacher(model, denoisers_of(model)[0]))
    try:
        index = _pipeline_index(str(model))
    except (OSError, ValueError) as error:
        raise ModelError(f"the model_index.json of {str(model)!r} cannot be read ({_first_line(error)})") from None
    if index is not None:
        return list(_examine_pipeline_folder(str(model), index))
    student = _empty_student(str(model))
    return list(_examine_student(student, _processor(str(model))))


def examine_machine() -> list[Finding]:
    """Reports what of lavender runs on this machine, and by which kernels. A missing part has a remedy
    only if lavender needs it."""
    return list(_examine_machine())


def _pipeline_index(model: str) -> dict[str, Any] | None:
    """A pipeline's model_index.json from a folder or the hub, or None."""
    if Path(model).is_dir():
        file = Path(model) / "model_index.json"
        return json.loads(file.read_text()) if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(model, "model_index.json")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return None  # no such file, or no such model: transformers reports the latter
    index: dict[str, Any] = json.loads(Path(path).read_text())
    return index


def _empty_student(model: str) -> nn.Module:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            student: nn.Module = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{model!r} is no image-text-to-text model of transformers and no diffusers pipeline ({_first_line(error)}); give a "
            "folder that save_pretrained wrote, or a hub id"
        ) from None
    return student


def _processor(model: str) -> Any:
    """The model's processor, or the error that loading it raised."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(model)
        # transformers falls back to the tokenizer alone if a part of the processor cannot be loaded.
        return processor if hasattr(processor, "tokenizer") else ImportError(f"only a {type(processor).__name__} could be loaded")
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        return error


def _examine_student(model: Any, processor: Any) -> Iterator[Finding]:
    import torch

    from .students.discovery import attention_modules, base_model_of, is_cross, layers_around, text_tower
    from .students.families import known_family
    from .students.registry import require_supported

    model = base_model_of(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    yield Finding("model", f"{type(model).__name__} (model type {model_type}), a student")
    try:
        decoder = text_tower(model)
        modules = attention_modules(decoder)
        layers_around(decoder, {module: i for i, module in enumerate(modules)})
    except ModelError as error:
        yield Finding("attention", str(error), "lavender cannot capture this model; its attention must go through the registry")
        return
    yield Finding("text tower", f"{type(decoder).__name__}{_name_path(model, decoder)}")
    names = {module: name for name, module in decoder.named_modules()}
    kinds = Counter(type(module).__name__ for module in modules)
    has_cross = any(is_cross(names[module], module) for module in modules)
    yield Finding(
        "attention layers",
        f"{len(modules)} ({', '.join(f'{n} x {kind}' for kind, n in kinds.items())}), "
        + ("cross-attention to the picture" if has_cross else "the picture's tokens stand in the text"),
    )
    name = decoder.config._attn_implementation
    try:
        require_supported(name)
        yield Finding("base attention", f"{name}, kept as it is")
    except ModelError as error:
        yield Finding("base attention", name, str(error))
    if not hasattr(model.config, "vision_config") and known_family(str(model_type)) is None:
        yield Finding("picture", "the model's config has no vision_config", "give an image-text-to-text model")
    yield _grid(model, model_type, processor)
    yield from _examine_processor(model, processor)
    width = getattr(modules[0], "head_dim", None)
    yield _kernels("row_maps", width, getattr(model, "dtype", torch.float32))


def _grid(model: Any, model_type: str | None, processor: Any) -> Finding:
    from .students.families import STUDENTS, Family, known_family
    from .students.image_tokens import model_type_of

    if processor is not None and not isinstance(processor, Exception):
        with suppress(LavenderError):
            model_type = model_type_of(processor, model.config)
    family = known_family(model_type or "")
    if family is None:
        return Finding(
            "grid rule",
            f"unknown for model type {model_type!r}: attention is captured per image token, without places",
            "write a Family with boxes, one per image token, and lavender.register_family it: see docs/add-a-family.md",
        )
    entry = STUDENTS[str(model_type)]
    rule = "registered by you" if isinstance(entry, Family) else entry.split(":")[0]
    resampled = ", carried through its resampler" if family.resamplers is not None else ""
    return Finding("grid rule", f"{rule}{resampled} (model type {model_type!r})")


def _examine_processor(model: Any, processor: Any) -> Iterator[Finding]:
    from .students.image_tokens import image_token_of

    if processor is None:
        return
    if isinstance(processor, Exception):
        yield Finding("processor", f"does not load ({_first_line(processor)})", "install what it asks for; boxes need it")
        return
    yield Finding("processor", type(processor).__name__)
    try:
        yield Finding("image token", str(image_token_of(processor, model.config)))
    except LavenderError as error:
        yield Finding("image token", "unknown", str(error))
    if not getattr(processor, "chat_template", None):
        yield Finding("chat template", "none", "set processor.chat_template for training; look(prompt=...) works without")
    if not processor.tokenizer.is_fast:
        yield Finding("tokenizer", "gives no character offsets", "load the fast one for training")


def _examine_pipeline_folder(model: str, index: dict[str, Any]) -> Iterator[Finding]:
    import diffusers
    import torch

    try:
        part = next(name for name in ("unet", "transformer") if (index.get(name) or [None])[0])
        kind, denoiser_class = getattr(diffusers, index["_class_name"]), getattr(diffusers, index[part][1])
    except (StopIteration, AttributeError, KeyError, TypeError, IndexError):
        name = index.get("_class_name") if isinstance(index, dict) else None
        raise ModelError(
            f"{model!r} is a {name}; expected a text-to-image pipeline of diffusers with a unet or a transformer"
        ) from None
    try:
        with torch.device("meta"):
            denoiser = denoiser_class.from_config(denoiser_class.load_config(model, subfolder=part))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"the {part} of {model!r} cannot be built from its config ({_first_line(error)})") from None
    yield from _examine_teacher(object.__new__(kind), denoiser)


def _examine_teacher(pipe: Any, denoiser: Any) -> Iterator[Finding]:
    import torch

    from .teachers.families import teacher_family_of
    from .teachers.prompts import parts_of
    from .teachers.recording import DenoiserHooks, hides_attention, remedy_of

    yield Finding("model", f"{type(pipe).__name__} with {type(denoiser).__name__}, a teacher")
    try:
        hooks = DenoiserHooks(denoiser)
        hooks.remove()
    except ModelError as error:
        yield Finding("layout", str(error), "add a Layout to lavender/teachers/denoisers.py: see docs/add-a-family.md")
        return
    order = {"cross": "cross-attention to text alone"}.get(
        hooks.layout.order, f"text and picture in one sequence, {hooks.layout.order}"
    )
    yield Finding("layout", order)
    yield Finding("attention layers", f"{len(hooks.modules)}, {next(iter(hooks.modules))} and so on")
    processors = sorted({type(getattr(module, "processor", None)).__name__ for module in hooks.modules.values()})
    hidden = [module for module in hooks.modules.values() if hides_attention(module)]
    yield Finding("attention processors", ", ".join(processors), remedy_of(hidden[0]) if hidden else "")
    try:
        parts = parts_of(pipe)
        yield Finding("words", " and ".join(part.tokenizer for part in parts))
    except ModelError as error:
        yield Finding("words", "unknown", str(error))
    try:
        family = teacher_family_of(type(pipe))
        yield Finding("extraction", f"of target stores, by noise or {'flow' if family.flow_matching else 'ddim or null_text'}")
    except ModelError as error:
        yield Finding("extraction", str(error))
    module = next(iter(hooks.modules.values()))
    width = getattr(module, "inner_dim", 0) // max(1, getattr(module, "heads", 1)) or None
    yield _kernels("column_maps", width, getattr(denoiser, "dtype", torch.float32))


def _kernels(operation: str, width: int | None, dtype: torch.dtype) -> Finding:
    """The implementation of an operation that runs on this machine, and why no faster one does."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, refusals = _choice(operation, width or _WIDTH, dtype, device)
    heads = f"heads of {width or f'unknown width, taken for {_WIDTH}'} in {str(dtype).removeprefix('torch.')}"
    return Finding("kernels", "; ".join([f"{operation} by {name!r} ({heads})", *refusals]))


@dataclass(frozen=True)
class _Tensor:
    """The part of a tensor that decides the implementation; nothing is allocated on the device."""

    dtype: torch.dtype
    device: torch.device


def _choice(operation: str, width: int, dtype: torch.dtype, device: torch.device) -> tuple[str, list[str]]:
    """The implementation that `impl="auto"` takes for heads of this width, and why no faster one."""
    from .kernels.column_maps import api as column_maps
    from .kernels.dispatch import cuda_reasons, triton_reasons
    from .kernels.row_maps import api as row_maps

    tensor: Any = _Tensor(dtype, device)
    widest_float32 = {"row_maps": row_maps, "column_maps": column_maps}[operation].WIDEST_FLOAT32
    candidates = {
        "triton": lambda: triton_reasons(tensor, width, widest_float32, by_name=False),
        "cuda": lambda: cuda_reasons(operation, tensor, width, 1, by_name=False),
    }
    refusals: list[str] = []
    for name, why_not in candidates.items():
        reasons = why_not()
        if not reasons:
            return name, refusals
        refusals.append(f"not by {name!r}: {'; '.join(reasons)}")
    return "torch", refusals


def _examine_machine() -> Iterator[Finding]:
    yield Finding("lavender", f"{_version('lavender-attention') or 'not installed'} in {Path(__file__).parent}")
    yield Finding("python", f"{platform.python_version()} ({sys.executable}) on {platform.system()} {platform.machine()}")
    try:
        import torch

        version = str(torch.__version__)
    except Exception as error:  # a half-removed or broken torch fails in many ways: report each
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            yield Finding("torch", "not installed: nothing of lavender runs without it", "pip install torch")
        else:
            yield Finding("torch", f"does not load ({_first_line(error)})", "pip install --force-reinstall torch")
    else:
        yield Finding("torch", f"{version}, built for {_platform_of_torch()}")
        yield from _examine_device()
    for name in _NEEDED:
        yield Finding(name, _version(name) or "not installed", "" if _version(name) else f"pip install {name}")
    for name, (extra, use) in _OPTIONAL.items():
        yield Finding(name, _version(name) or f"not installed; for {use}: pip install 'lavender-attention[{extra}]'")


def _platform_of_torch() -> str:
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"


def _examine_device() -> Iterator[Finding]:
    """The CUDA devices, and what can run on the current one."""
    import torch

    from .kernels.cuda.driver import OLDEST
    from .kernels.dispatch import HAS_TRITON, triton_reasons

    device, architecture = torch.device("cpu"), None
    if torch.cuda.is_available():
        device = torch.device("cuda")
        major, minor = torch.cuda.get_device_capability(device)
        architecture = 10 * major + minor
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            name = torch.cuda.get_device_name(index)
            card = f"{name}, compute capability {major}.{minor}, {memory:.1f} GiB"
            if _torch_knows(major, minor):
                yield Finding(f"cuda:{index}", card)
            else:
                card += f"; this torch has no kernels for it, but for {', '.join(torch.cuda.get_arch_list())}"
                remedy = "PyTorch's index for CUDA 12.6 (cu126), torch<2.15" if major == 7 else "another index of PyTorch's"
                yield Finding(f"cuda:{index}", card, f"install a torch that knows the card: {remedy}")
    else:
        yield Finding("CUDA device", "none: the kernels run by 'torch', on the CPU, without triton, NVRTC or a driver")
    half: Any = _Tensor(torch.float16, device)
    refusals = triton_reasons(half, _WIDTH, _WIDTH, by_name=False)
    if HAS_TRITON:
        runs = f"do not run here: {'; '.join(refusals)}" if refusals else "run on the device"
        yield Finding("triton", f"{_version('triton') or 'installed'}; its kernels {runs}")
    else:
        remedy = "pip install triton" if architecture is not None and architecture >= 80 and sys.platform == "linux" else ""
        yield Finding("triton", "not installed", remedy)
    compiles = architecture is not None and architecture >= OLDEST
    yield from _examine_cuda(architecture if compiles else None, needed=compiles and bool(refusals))
    if _version("numpy"):  # which the operations import
        for operation in ("row_maps", "column_maps"):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                chosen, reasons = _choice(operation, _WIDTH, dtype, device)
                refused = compiles and dtype == torch.float16 and chosen == "torch"
                result = "; ".join([f"by {chosen!r}", *(reasons if device.type == "cuda" else ())])
                remedy = "the card could run its own kernels: mend what refuses them" if refused else ""
                yield Finding(f"{operation} {str(dtype).removeprefix('torch.')}", result, remedy)


def _torch_knows(major: int, minor: int) -> bool:
    """Whether torch's own kernels run on a card: torch was built for its capability, for an older one of
    the same major version, or with PTX."""
    import torch

    known = [(kind, int(number.rstrip("af"))) for kind, _, number in (arch.partition("_") for arch in torch.cuda.get_arch_list())]
    card = 10 * major + minor
    return not known or any(
        number <= card and (kind == "compute" or number // 10 == major) for kind, number in known if kind in ("sm", "compute")
    )


def _examine_cuda(architecture: int | None, needed: bool) -> Iterator[Finding]:
    """What the CUDA C++ kernels are compiled and loaded with. Missing parts have remedies if `needed`."""
    from .kernels.cuda import driver as cuda
    from .kernels.cuda import nvrtc

    try:
        library = nvrtc.find_nvrtc(architecture)
        capabilities = ", ".join(f"{number // 10}.{number % 10}" for number in library.architectures)
        yield Finding("NVRTC", f"{library.version[0]}.{library.version[1]} ({library.path}), for compute capability {capabilities}")
    except nvrtc.CompileError as error:
        yield Finding("NVRTC", str(error), "pip install --upgrade nvidia-cuda-nvrtc-cu12" if needed else "")
    version = ctypes.c_int()
    try:
        cuda.call_driver("cuDriverGetVersion", ctypes.byref(version))
        yield Finding("CUDA driver", f"for CUDA up to {version.value // 1000}.{version.value % 1000 // 10}")
    except cuda.DriverError as error:
        yield Finding("CUDA driver", str(error), "install the card's driver" if needed else "")
    remedy = "set LAVENDER_CACHE to a folder that can be written" if needed else ""
    try:
        folder = nvrtc.cache_folder()
    except FileNotFoundError as error:
        yield Finding("kernel cache", f"{error.filename}: {error.strerror}", remedy)
        return
    if _can_be_written(folder):
        yield Finding("kernel cache", f"{folder}, can be written")
    else:
        yield Finding("kernel cache", f"{folder}, cannot be written: every process compiles anew", remedy)


def _can_be_written(folder: Path) -> bool:
    """Tries to write a file into a folder, which it makes if there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _name_path(model: nn.Module, part: nn.Module) -> str:
    name = next((name for name, module in model.named_modules() if module is part), "")
    return f" at {name}" if name else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

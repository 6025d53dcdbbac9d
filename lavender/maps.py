"""Word maps of a patched model: one word's heat map, laid over a picture, plotted, or differentiated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from .errors import CaptureError, DataError, ModelError, importing
from .images import ImageSource, load_image
from .kernels.map_loss import resample
from .types import Word, WordMaps
from .words import match_words, words_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """Raw word maps of one attention layer.

    Attributes:
        layer: the module's dotted name in its model.
        maps: [..., C, W, y, x], or [..., C, W, F, y, x] of a video with F frames; C is the number of heads, or 1 for their mean.
        step: the denoiser's forward, from 0; None for the mean over all of them, or where there was one.
        forwards: how many forwards the maps are the mean of; a layer that ran on several grids has maps of each.
    """

    layer: str
    maps: torch.Tensor
    step: int | None = None
    forwards: int = 1


def layer_shares(entries: Sequence[LayerMaps]) -> list[float]:
    """Each entry's share of their mean: that of layers, of which each is the mean over its forwards."""
    forwards = Counter[str]()
    for entry in entries:
        forwards[entry.layer] += entry.forwards
    return [entry.forwards / forwards[entry.layer] / len(forwards) for entry in entries]


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Where one word looks: attention `values`, [y, x], raw and differentiable if the model ran with gradients."""

    word: str
    values: torch.Tensor

    def mean(self) -> torch.Tensor:
        """The mean over the picture, a scalar: `.mean().backward()` gives gradients."""
        return self.values.mean()

    def sum(self) -> torch.Tensor:
        """The sum over the picture, a scalar; of a language model, the share of its attention that the picture gets."""
        return self.values.sum()

    def to_numpy(self, size: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """float32 [y, x]; with `size` (height, width), resampled to it."""
        values = self.values.detach().float()
        if size is not None:
            values = F.interpolate(values[None, None], size=size, mode="bicubic", antialias=True)[0, 0]
        return values.cpu().numpy()

    def overlay(self, image: ImageSource | NDArray[Any], opacity: float = 0.85, colormap: str = "inferno") -> Image.Image:
        """The picture, upright, with the map over it, scaled to its own range; see `overlay`.

        `image` is a path, encoded bytes, a PIL image of any size, or an array [y, x, 3]: uint8, or floats from 0 to 1 as pipelines
        return them. Raises `DataError` for anything else.
        """
        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype.kind not in "uf" or image.dtype.itemsize > 8:
                raise DataError(
                    f"an array of {image.dtype} {image.shape} is no picture; expected [y, x, 3], uint8 or floats up to 1"
                )
            pixels = image if image.dtype == np.uint8 else (image.clip(0, 1) * 255).round().astype(np.uint8)
        else:
            pixels = np.asarray(load_image(image))
        return Image.fromarray(overlay(pixels, self.to_numpy(), opacity, colormap))

    def plot(self, image: ImageSource | NDArray[Any] | None = None, ax: Axes | None = None) -> Axes:
        """Draws the map, over the picture if there is one, with the word as title, on matplotlib axes."""
        with importing():
            from matplotlib import pyplot as plt

        axes = ax if ax is not None else plt.figure().add_subplot()
        if image is None:
            axes.imshow(self.to_numpy(), cmap="inferno")
        else:
            axes.imshow(np.asarray(self.overlay(image)))
        axes.set_title(self.word)
        axes.set_axis_off()
        return axes


def overlay(
    picture: NDArray[np.uint8], values: NDArray[np.float32], opacity: float = 0.85, colormap: str = "inferno"
) -> NDArray[np.uint8]:
    """A heat map over its picture, scaled to its own range.

    Args:
        picture: uint8 [h, w, 3].
        values: [y, x], of any grid.
        opacity: of the map where it is hottest; where it is coldest it is 0.5 less, which leaves a dimmed picture.
        colormap: a name that matplotlib knows.
    """
    with importing():
        from matplotlib import colormaps

    low, high = float(values.min()), float(values.max())
    scaled = Image.fromarray(((values - low) / (high - low + 1e-12)).astype(np.float32))
    heat = np.asarray(scaled.resize(picture.shape[1::-1], Image.Resampling.BILINEAR)).clip(0, 1)[..., None]
    colored = colormaps[colormap](heat[..., 0])[..., :3] * 255
    share = (opacity - 0.5 + 0.5 * heat).clip(0, 1)
    painted: NDArray[np.uint8] = (picture * (1 - share) + colored * share).round().astype(np.uint8)
    return painted


def chosen_names(names: Sequence[str], parts: Sequence[str]) -> list[str]:
    """The names that one of `parts` is a part of; a part that is a whole name means that name alone.

    Raises `ModelError` for a part that is in no name.
    """
    for part in parts:
        if not any(part in name for name in names):
            raise ModelError(f"no attention layer is named like {part}; there are: {', '.join(names)}")
    return [name for name in names if any(part == name if part in names else part in name for part in parts)]


@dataclass(frozen=True)
class Coverage:
    """What the maps of a picture were read from.

    Attributes:
        forwards: how many of the denoiser's forwards were read: one in each step.
        left_out: how many were not, by reason.
        missing_layers: attention layers that could not be read.
        partly_read: layers that were read in some of these forwards alone, and in how many: the others left them out.
    """

    forwards: int
    left_out: Mapping[str, int]
    missing_layers: tuple[str, ...]
    partly_read: Mapping[str, int]


class Maps(Mapping[str, HeatMap]):
    """The heat maps of every word of a text for one picture.

    `maps["cat"]` is the mean over heads, layers and denoising steps; `heat_map` chooses among them.

    Attributes:
        text: the prompt of a diffusion model, the answer of a vision-language model.
        words: W words of it, in order; a repeated word repeats.
        entries: what was recorded, per layer (and per step, if steps were kept).
        missing: the words, and tokens, that have no map: the text was cut off before them.
        tokens: of a diffusion model's text, further tokens that have maps: by their strings, or by the numbers of their columns.
        coverage: of a diffusion model's picture, what was read; None of a vision-language model's answer.
    """

    def __init__(
        self,
        text: str,
        words: Sequence[Word],
        entries: Sequence[LayerMaps],
        missing: Sequence[Word | str | int] = (),
        tokens: Sequence[str | int] = (),
        coverage: Coverage | None = None,
    ) -> None:
        self.text = text
        self.words = tuple(words)
        self.entries = tuple(entries)
        self.missing = tuple(missing)
        self.tokens = tuple(tokens)
        self.coverage = coverage

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order in which they ran."""
        return tuple(dict.fromkeys(entry.layer for entry in self.entries))

    def __iter__(self) -> Iterator[str]:
        """The words that have a map, in order, each once."""
        return iter(dict.fromkeys(word.text for word in self.words if word not in self.missing))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, word: object) -> bool:
        try:
            return isinstance(word, str) and self[word] is not None
        except (KeyError, CaptureError):
            return False

    def __getitem__(self, word: str | int) -> HeatMap:
        """Heat map of a word or phrase, whatever its case; of a repeated one, its first occurrence. Of a token, see `tokens`."""
        return self.heat_map(word)

    def heat_map(
        self,
        word: str | int,
        *,
        occurrence: int | None = None,
        layers: str | int | Sequence[str | int] = (),
        head: int | None = None,
        step: int | Literal["all"] | None = None,
        frame: int | None = None,
    ) -> HeatMap:
        """One word's heat map, the mean over everything that is not chosen, each layer resampled to the finest one's grid.

        Args:
            word: a word of the text, or several in a row: the mean over their maps; or one of `tokens`.
            occurrence: which of a repeated word's occurrences, from 0, which is the one by default.
            layers: numbers into `layers`, names, or parts of names; all if empty.
            head: an attention head; heads must have been kept.
            step: a forward of the denoiser, from 0, where steps were kept; or "all".
            frame: a frame of a video's latent.

        Raises:
            KeyError: the text lacks the word.
            ModelError: no layer has such a name.
            CaptureError: the word has no tokens, or what is chosen was not recorded.
        """
        places = self._places(word, occurrence)
        wanted = self._wanted([layers] if isinstance(layers, str | int) else layers, step)
        values = self._mean(wanted, places, head, frame)
        return HeatMap(self._title(word, places), values)

    def _mean(self, entries: Sequence[LayerMaps], places: Sequence[int], head: int | None, frame: int | None) -> torch.Tensor:
        """The map [y, x] of some words, from some of the entries."""
        size = max((entry.maps.shape[-2:] for entry in entries), key=lambda s: s[0] * s[1])
        total: torch.Tensor | None = None
        for entry, share in zip(entries, layer_shares(entries), strict=True):
            maps = of_frame(of_head(entry, entry.maps[:, places].mean(dim=1), head).mean(dim=0), frame)
            resized = share * resample(maps[None, None], size)[0, 0]
            total = resized if total is None else total + resized
        assert total is not None
        return total

    def _title(self, word: str | int, places: Sequence[int]) -> str:
        return str(word) if word in self.tokens else " ".join(self.words[i].text for i in places)

    def _places(self, word: str | int, occurrence: int | None) -> list[int]:
        parts = ([part.text for part in words_of(word)] or [word]) if isinstance(word, str) else []
        starts = (self._starts(parts) or self._starts([part.casefold() for part in parts], fold=True)) if parts else []
        # Words win: maps["the"] is the word's whether or not a token is called so too.
        if word in self.tokens and not (starts and " ".join(parts) == word):
            if word in self.missing:
                raise CaptureError(f"{word!r} has no map: no text column of {self.text!r} comes from such a token")
            return [self.tokens.index(word) - len(self.tokens)]  # behind the words
        if not isinstance(word, str):
            raise KeyError(f"column {word} was not asked for; a pipeline reads it with lavender.patch(..., tokens=({word},))")
        occurrence = occurrence or 0
        if not starts:  # part of a run that has no spaces, or another composition of the letters
            parts = parts[:1]
            [parts_of_run] = match_words(self.text, [word])
            starts = [i for i, w in enumerate(self.words) if any(w.start <= p.start and p.end <= w.end for p in parts_of_run)]
        if not 0 <= occurrence < len(starts):
            known = list(dict.fromkeys(w.text for w in self.words))
            is_word = [part.text for part in words_of(word)] == parts and " ".join(parts) == word
            raise KeyError(
                f"no word {word!r} (occurrence {occurrence}) in {self.text!r}; its words: {known}"
                + ("" if is_word else f". A pipeline reads a token that is no word with lavender.patch(..., tokens=({word!r},))")
            )
        places = list(range(starts[occurrence], starts[occurrence] + len(parts)))
        lost = [self.words[i].text for i in places if self.words[i] in self.missing]
        if lost:
            raise CaptureError(
                f"{lost[0]!r} has no map: the text encoder's window ends before it, or the encoder that the denoiser reads was "
                "given another prompt"
            )
        return places

    def _starts(self, parts: Sequence[str], fold: bool = False) -> list[int]:
        """Where the words `parts` stand one after the other."""
        texts = [word.text.casefold() if fold else word.text for word in self.words]
        runs = [self.words[i : i + len(parts)] for i in range(len(texts) - len(parts) + 1)]
        in_order = [all(a.end <= b.start for a, b in pairwise(run)) for run in runs]
        return [i for i, ordered in enumerate(in_order) if ordered and texts[i : i + len(parts)] == list(parts)]

    def _wanted(self, layers: Sequence[str | int], step: int | Literal["all"] | None) -> list[LayerMaps]:
        names = self.layers
        numbers = [c for c in layers if isinstance(c, int)]
        beyond = [number for number in numbers if not 0 <= number < len(names)]
        if beyond:
            raise CaptureError(f"there are no layers {beyond}; there are 0 to {len(names) - 1}")
        if layers:
            named = chosen_names(names, [c for c in layers if isinstance(c, str)])
            names = tuple(name for i, name in enumerate(names) if i in numbers or name in named)
        entries = [entry for entry in self.entries if entry.layer in names]
        if step is None or step == "all":
            return entries
        steps = sorted({entry.step for entry in entries if entry.step is not None})
        if not steps:
            raise CaptureError("steps were not kept apart; a pipeline keeps them with lavender.patch(..., steps=True)")
        if step not in steps:
            raise CaptureError(f"there is no step {step}; there are {steps[0]} to {steps[-1]}")
        return [entry for entry in entries if entry.step == step]

    def to_numpy(self, size: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """float32 [W, y, x], means over everything else; rows of NaN for words that were cut off."""
        maps = [None if w in self.missing else self.heat_map_of(i).to_numpy(size) for i, w in enumerate(self.words)]
        known = next((m for m in maps if m is not None), None)
        if known is None:
            raise CaptureError(f"no word of {self.text!r} has a map")
        return np.stack([np.full_like(known, np.nan) if m is None else m for m in maps])

    def heat_map_of(self, index: int) -> HeatMap:
        """Heat map of the word `words[index]`."""
        word = self.words[index]
        occurrence = sum(other.text == word.text for other in self.words[:index])
        return self.heat_map(word.text, occurrence=occurrence)

    def to_word_maps(self) -> WordMaps:
        """As targets for training; see `lavender.TargetStore`."""
        return WordMaps(self.text, self.words, self.to_numpy())

    def plot(self, image: ImageSource | NDArray[Any] | None = None, columns: int = 5) -> Figure:
        """Draws every word's map, over the picture if there is one, on a new matplotlib figure."""
        with importing():
            from matplotlib import pyplot as plt

        shown = [i for i, word in enumerate(self.words) if word not in self.missing]
        if not shown:
            raise CaptureError(f"no word of {self.text!r} has a map")
        height = -(-len(shown) // columns)
        width = min(columns, len(shown))
        figure, axes = plt.subplots(height, width, figsize=(2.4 * width, 2.7 * height), squeeze=False, layout="constrained")
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, index in zip(axes.flat, shown, strict=False):
            self.heat_map_of(index).plot(image, axis)
        return figure

    def __repr__(self) -> str:
        return f"Maps({self.text!r}, {len(self.layers)} layers)"


def of_head(entry: LayerMaps, maps: torch.Tensor, head: int | None) -> torch.Tensor:
    """Of an entry's maps [C, ...] one head's, [1, ...], or all. Raises `CaptureError` if it was not kept."""
    if head is None:
        return maps
    if len(maps) == 1:
        raise CaptureError("heads were not kept apart; ask for them with lavender.patch(..., heads=True)")
    if not 0 <= head < len(maps):
        raise CaptureError(f"there is no head {head}; {entry.layer} has heads 0 to {len(maps) - 1}")
    return maps[head : head + 1]


def of_frame(maps: torch.Tensor, frame: int | None) -> torch.Tensor:
    """Of maps [y, x], or [F, y, x] of a video, one frame's or the mean of all, [y, x]. Raises `CaptureError` if there is none."""
    if frame is not None and not (maps.ndim == 3 and 0 <= frame < len(maps)):
        raise CaptureError(f"there is no frame {frame}; there are {len(maps) if maps.ndim == 3 else 'none'}")
    if maps.ndim == 2:
        return maps
    return maps.mean(dim=0) if frame is None else maps[frame]


def of_picture(entries: Sequence[LayerMaps], picture: int) -> list[LayerMaps]:
    """One picture of a batch: its entries without the leading batch axis."""
    return [replace(entry, maps=entry.maps[picture]) for entry in entries]

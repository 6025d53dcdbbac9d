"""From a target store to word maps as Lavender's authors publish them; see `lavender.targets.published_format`."""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ..config import DEFAULT_QUESTION, Format
from ..data.samples import PLACEHOLDER, Conversation, Sample
from ..errors import ConfigError, DataError, TargetError
from ..files import path_within, replacing
from ..images import ImageSource, image_sha256, load_image, read_bytes
from ..types import WHOLE_PICTURE, Box
from .published_format import ROWS_AT_ONCE, images_of, name_of, without_number
from .store import Target, TargetStore


@dataclass(frozen=True)
class Exported:
    """What `export_targets` did: samples and maps written, and for what was left out an id with the reason."""

    written: int
    maps: int
    failed: tuple[tuple[str, str], ...]


def _question_of(sample: Sample | Conversation) -> str:
    if isinstance(sample, Sample):
        return sample.question
    questions = (message.content for message in sample.messages if message.role == "user")
    return next(questions, DEFAULT_QUESTION).replace(PLACEHOLDER, "").strip()


def export_targets(
    store: TargetStore,
    out: str | Path,
    *,
    format: Format,
    samples: Iterable[Sample | Conversation] | None = None,
    images: str | Path | None = None,
    progress: bool = True,
) -> Exported:
    """Writes a target store as published: every map scaled to reach from 0 to 255, as a JPEG or, in a table, as a PNG.

    The maps of a word that occurs several times are averaged; in a folder, that has one map for a word of a picture, also those of
    several samples with the same picture. Words without a map are left out; so are, in a folder, words that cannot be part of a
    file name or that the authors' code would cut off ("3.5", "a_b"), and a map that is the same everywhere is black.

    Args:
        store: the targets.
        out: a new or empty folder, or a new file whose name ends in `.parquet`.
        format: `"folder"` or `"parquet"`.
        samples: the samples of the store. They say what each one's picture and question are.
        images: folder of the pictures; without `samples`, the ids have to be paths in it. A table needs one of the two, for it
            contains the pictures. A folder without both has the last parts of the ids as file names.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: `format` is neither, `out` has the wrong suffix, or a table would lack its pictures.
        TargetError: `out` exists or is a link to nothing, or no word has a map.
    """
    path = Path(out)
    if format not in get_args(Format):
        raise ConfigError(f"format is {format!r}; choose {' or '.join(get_args(Format))}")
    if format == "parquet" and path.suffix.lower() != ".parquet":
        raise ConfigError(f"the table is to be {path}; give a file name that ends in .parquet")
    if format == "parquet" and samples is None and images is None:
        raise ConfigError("a table contains the pictures; give samples (--samples) or the folder of the pictures (--images)")
    if path.exists() and (format == "parquet" or not path.is_dir() or any(path.iterdir())):
        raise TargetError(f"{path} exists; give a new name")
    if path.is_symlink() and not path.exists():
        raise TargetError(f"{path} is a link to {os.readlink(path)}, where nothing is; give that name itself, or a new one")
    known = None if samples is None else {sample.id: sample for sample in samples}
    failed: list[tuple[str, str]] = []
    outgoing: list[_Outgoing] = []
    for sample_id in tqdm(store, desc="pictures", unit="sample", disable=not progress):
        try:
            outgoing.append(_prepare(store, sample_id, known, None if images is None else Path(images)))
        except (DataError, TargetError) as error:
            failed.append((sample_id, str(error)))
    write = _write_folder if format == "folder" else _write_table
    written, maps = write(store, path, outgoing, failed, progress)
    return Exported(written, maps, tuple(failed))


@dataclass(frozen=True, eq=False)
class _Outgoing:
    """A target to be written: its id, its picture's file name, the picture (None if unknown), the question and the words."""

    id: str
    name: str
    image: ImageSource | None
    question: str
    words: frozenset[str]
    image_sha256: str


def _prepare(store: TargetStore, sample_id: str, known: dict[str, Sample | Conversation] | None, images: Path | None) -> _Outgoing:
    """Raises `DataError` or `TargetError` if a target has no sample or no picture, or belongs to another one."""
    target = store[sample_id]
    image: ImageSource | None = None
    question = DEFAULT_QUESTION
    if known is not None:
        if sample_id not in known:
            raise DataError("no sample has this id")
        sources = images_of(known[sample_id])
        # Of a conversation's pictures one is the target's.
        matching = (source for source in sources if image_sha256(load_image(source)) == target.image_sha256)
        image = next(matching, None)
        if image is None:
            raise TargetError("the maps were made from another picture than the sample's")
        question = _question_of(known[sample_id])
    elif images is not None:
        image = path_within(images, without_number(sample_id), f"the sample {sample_id!r}")
        store.checked(sample_id, load_image(image))
    name = name_of(image, sample_id)
    return _Outgoing(sample_id, name, image, question, frozenset(_average([target])), target.image_sha256)


def _average(targets: Iterable[Target]) -> dict[str, NDArray[np.uint8]]:
    """The grey map [y, x] of every word that has one."""
    maps_of_word: dict[str, list[NDArray[np.float32]]] = {}
    for target in targets:
        for word, values in zip(target.word_maps.words, target.word_maps.maps, strict=True):
            if not np.isnan(values).any():
                maps_of_word.setdefault(word.text, []).append(_spread_over_picture(values, target.word_maps.crop))
    result = {}
    for text, maps in maps_of_word.items():
        mean = np.mean(maps, axis=0)
        low, high = mean.min(), mean.max()
        result[text] = np.rint(255 * (mean - low) / (high - low if high > low else 1)).astype(np.uint8)
    return result


def _spread_over_picture(values: NDArray[np.float32], crop: Box) -> NDArray[np.float32]:
    """A map of a part of a picture as one of the whole: published maps have no other; lowest where the teacher did not look."""
    if crop == WHOLE_PICTURE:
        return values
    sides = (*values.shape, *values.shape)
    top, left, bottom, right = (round(share * side) for share, side in zip(crop, sides, strict=True))
    part = Image.fromarray(values).resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BILINEAR)
    whole = np.full_like(values, values.min())
    whole[top:bottom, left:right] = np.asarray(part)[: bottom - top, : right - left]
    return whole


def _write_folder(
    store: TargetStore, root: Path, outgoing: Sequence[_Outgoing], failed: list[tuple[str, str]], progress: bool
) -> tuple[int, int]:
    groups: dict[str, list[_Outgoing]] = {}
    for item in outgoing:
        if not _is_file_name(item.name):
            failed.append((item.id, f"{item.name!r} cannot be the name of a folder"))
        elif item.name in groups and groups[item.name][0].image_sha256 != item.image_sha256:
            failed.append((item.id, f"another picture is called {item.name} too"))
        else:
            groups.setdefault(item.name, []).append(item)
    root.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, group in tqdm(groups.items(), desc="word maps", unit="picture", disable=not progress):
        # The authors' code takes the stem up to the first point.
        folder = root / name / "lpm_attention" / (name.split(".")[0] or name)
        folder.mkdir(parents=True)
        for word, grey in _average(store[item.id] for item in group).items():
            file = f"attention_{word}.jpg"
            if not _is_file_name(file) or set(word) & set("._"):
                failed.append((group[0].id, f"the word {word!r} cannot be part of a file name as published; a table can have it"))
                continue
            Image.fromarray(grey).save(folder / file, quality=100)
            count += 1
    return sum(map(len, groups.values())), count


def _is_file_name(name: str) -> bool:
    """Whether a text can name a file in a folder on any system, and nothing outside of it."""
    try:
        short = len(name.encode()) <= 255
    except UnicodeEncodeError:
        return False
    strange = any(c in '/\\:*?"<>|' or unicodedata.category(c) == "Cc" for c in name)
    return short and not strange and name not in ("", ".", "..")


def _write_table(
    store: TargetStore, path: Path, outgoing: Sequence[_Outgoing], failed: list[tuple[str, str]], progress: bool
) -> tuple[int, int]:
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    words = sorted({word for item in outgoing for word in item.words})
    if not words:
        raise TargetError(f"no word of {store.folder} has a map that could be written{': ' + failed[0][1] if failed else ''}")
    features = {
        "image": ImageFeature(),
        "question": Value("string"),
        "answers": Value("string"),
        "attention_images": {word: ImageFeature() for word in words},
    }
    schema = Features(features).arrow_schema
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with (
        replacing(Path(os.path.realpath(path))) as file,
        pq.ParquetWriter(file, schema) as writer,
        tqdm(total=len(outgoing), unit="sample", disable=not progress) as bar,
    ):
        for start in range(0, len(outgoing), ROWS_AT_ONCE):
            rows = []
            for item in outgoing[start : start + ROWS_AT_ONCE]:
                assert item.image is not None
                target = store[item.id]
                maps = {
                    word: {"bytes": _png(Image.fromarray(grey)), "path": f"attention_{word}.png"}
                    for word, grey in _average([target]).items()
                }
                count += len(maps)
                rows.append(
                    {
                        "image": {"bytes": _encode(item.image), "path": item.name},
                        "question": item.question,
                        "answers": target.word_maps.caption,
                        "attention_images": maps,
                    }
                )
                bar.update()
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return len(outgoing), count


def _encode(image: ImageSource) -> bytes:
    data = read_bytes(image)
    return _png(load_image(image)) if data is None else data


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()

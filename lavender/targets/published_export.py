"""From a target store to word maps as Lavender's authors publish them; see `lavender.targets.published_format`."""

from __future__ import annotations

import io
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ..config import DEFAULT_QUESTION, Format
from ..data.samples import PLACEHOLDER, Conversation, Sample
from ..errors import ConfigError, DataError, TargetError
from ..files import FolderLock, name_full_disk, own_path, path_within, synchronize, synchronize_all
from ..images import ImageSource, image_sha256, load_image, read_bytes
from ..signals import Stopped, stopping
from ..types import WHOLE_PICTURE, Box
from .published_format import ROWS_AT_ONCE, images_of, name_of, without_number
from .store import Target, TargetStore

_Progress = Callable[..., Iterator[Any]]
"""Goes through items with a progress bar, until the process is asked to end."""


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
        TargetError: `out` exists or is a link to nothing, another process exports to it, no word has a map, or the disk is full.
        Stopped: the process was asked to end by SIGTERM or SIGUSR1.
    """
    path = Path(out)
    if format not in get_args(Format):
        raise ConfigError(f"format is {format!r}; choose {' or '.join(get_args(Format))}")
    if format == "parquet" and path.suffix.lower() != ".parquet":
        raise ConfigError(f"the table is to be {path}; give a file name that ends in .parquet")
    if format == "parquet" and samples is None and images is None:
        raise ConfigError("a table contains the pictures; give samples (--samples) or the folder of the pictures (--images)")
    if path.is_symlink() and not path.exists():
        raise TargetError(f"{path} is a link to {os.readlink(path)}, where nothing is; give that name itself, or a new one")
    _require_new(path, format)
    known = None if samples is None else {sample.id: sample for sample in samples}
    failed: list[tuple[str, str]] = []
    outgoing: list[_Outgoing] = []
    with stopping() as stop, _set_aside(path, format) as place:

        def going_on(items: Iterable[Any], **bar: Any) -> Iterator[Any]:
            for item in tqdm(items, disable=not progress, **bar):
                if stop.requested:
                    raise Stopped(f"ended by {stop.named()}, nothing of {path} is written; the same command begins it anew")
                yield item

        for sample_id in going_on(store, desc="pictures", unit="sample"):
            try:
                outgoing.append(_prepare(store, sample_id, known, None if images is None else Path(images)))
            except (DataError, TargetError) as error:
                failed.append((sample_id, str(error)))
        write = _write_folder if format == "folder" else _write_table
        written, maps = write(store, place, outgoing, failed, going_on)
    return Exported(written, maps, tuple(failed))


def _require_new(path: Path, format: Format) -> None:
    if os.path.ismount(path):  # nothing else takes its name
        raise TargetError(f"{path} is a mount point; give a new name in it")
    if path.exists() and (format == "parquet" or not path.is_dir() or any(path.iterdir())):
        raise TargetError(f"{path} exists; give a new name")


@contextmanager
def _set_aside(path: Path, format: Format) -> Iterator[Path]:
    """Where a folder or a file is written that takes its name when it is whole, by one process at a time: in `<path>.exporting`,
    which goes afterwards. What a kill left in it is written anew."""
    with name_full_disk(path.parent, TargetError):
        path.parent.mkdir(parents=True, exist_ok=True)
        final = Path(os.path.realpath(path))  # what a link leads to is the user's
        try:
            aside = own_path(final.parent, f"{final.name}.exporting")
        except DataError as error:
            raise TargetError(str(error)) from None
        if os.path.lexists(aside) and (not aside.is_dir() or {child.name for child in aside.iterdir()} - _ASIDE):
            raise TargetError(f"{aside} is no folder of an export that was cut off; remove it, or give another name")
        aside.mkdir(exist_ok=True)
        try:
            with FolderLock(aside, error=TargetError):
                try:
                    _require_new(path, format)  # again: another process may have finished in between
                    _remove(aside / "data")
                    yield aside / "data"
                    synchronize_all(aside / "data")
                    os.rename(aside / "data", final)
                    synchronize(final.parent)
                finally:
                    _remove(aside / "data")
                    # Another process that has opened it already finds that it is gone, or that the export is there.
                    (aside / ".lock").unlink(missing_ok=True)
        finally:
            with suppress(OSError):  # another process is in it
                aside.rmdir()


_ASIDE = {".lock", ".lock.json", ".lock.json.partial", "data"}
"""What an export has in the folder beside the place that it is to take."""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    store: TargetStore, root: Path, outgoing: Sequence[_Outgoing], failed: list[tuple[str, str]], going_on: _Progress
) -> tuple[int, int]:
    groups: dict[str, list[_Outgoing]] = {}
    for item in outgoing:
        if not _is_file_name(item.name):
            failed.append((item.id, f"{item.name!r} cannot be the name of a folder"))
        elif item.name in groups and groups[item.name][0].image_sha256 != item.image_sha256:
            failed.append((item.id, f"another picture is called {item.name} too"))
        else:
            groups.setdefault(item.name, []).append(item)
    root.mkdir()
    count = 0
    for name, group in going_on(groups.items(), desc="word maps", unit="picture"):
        # The authors' code takes the stem up to the first point.
        folder = root / name / "lpm_attention" / (name.split(".")[0] or name)
        folder.mkdir(parents=True)
        for word, grey in _average(store[item.id] for item in group).items():
            file = f"attention_{word}.jpg"
            if not _is_file_name(file) or set(word) & set("._"):
                failed.append((group[0].id, f"the word {word!r} cannot be part of a file name as published; a table can have it"))
                continue
            # By way of memory: Pillow says nothing of a disk that is full.
            (folder / file).write_bytes(_encoded(Image.fromarray(grey), "JPEG", quality=100))
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
    store: TargetStore, path: Path, outgoing: Sequence[_Outgoing], failed: list[tuple[str, str]], going_on: _Progress
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
    count = 0
    remaining = going_on(outgoing, unit="sample")
    with open(path, "xb") as file, pq.ParquetWriter(file, schema) as writer:
        while chosen := list(islice(remaining, ROWS_AT_ONCE)):
            rows = []
            for item in chosen:
                assert item.image is not None
                target = store[item.id]
                maps = {
                    word: {"bytes": _encoded(Image.fromarray(grey), "PNG"), "path": f"attention_{word}.png"}
                    for word, grey in _average([target]).items()
                }
                count += len(maps)
                rows.append(
                    {
                        "image": {"bytes": _bytes_of(item.image), "path": item.name},
                        "question": item.question,
                        "answers": target.word_maps.caption,
                        "attention_images": maps,
                    }
                )
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return len(outgoing), count


def _bytes_of(image: ImageSource) -> bytes:
    data = read_bytes(image)
    return _encoded(load_image(image), "PNG") if data is None else data


def _encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()

"""From word maps as Lavender's authors publish them to a target store; see `lavender.targets.published_format`."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from ..data.samples import Conversation, Sample, require_unicode
from ..errors import ConfigError, DataError
from ..files import open_regular, path_within
from ..images import ImageSource, Picture, load_image
from ..signals import Stopped, stopping
from ..types import WordMaps
from ..words import match_words, words_and
from .manifest import StoreConfig
from .published_format import ROWS_AT_ONCE, images_of, name_of
from .store import Target, TargetWriter


@dataclass(frozen=True)
class Imported:
    """What one run of `import_targets` did, in samples; `unused_maps` have a word that no caption has, or cannot be read."""

    written: int
    present: int
    failed: int
    unused_maps: int


@dataclass(frozen=True, eq=False)
class _Row:
    """What a published set says of one picture.

    Attributes:
        name: the picture's file name.
        image: the picture, encoded or as the path that the set has; None where it has neither.
        answers: the captions that the set has.
        maps: words, each with its map as an encoded picture, or as the path that the set has.
    """

    name: str
    image: bytes | str | None
    answers: tuple[str, ...]
    maps: tuple[tuple[str, bytes | str], ...]


def import_targets(
    source: str | Path,
    out: str | Path,
    *,
    samples: Iterable[Sample | Conversation] | None = None,
    images: str | Path | None = None,
    progress: bool = True,
) -> Imported:
    """Writes a target store from published maps; a store that was begun from the same maps is continued.

    A published set names pictures, not samples. With `samples`, each sample whose picture has the same file name gets the maps of
    its answer's words (of a conversation, those of the answer that has most of the mapped words). Without, a table's answers are
    the captions, and a folder's captions are its words with spaces between them; the picture's file name is the id, with `#0`,
    `#1`... behind it where it has several captions. A word that occurs twice has the same map twice; words are the same whatever
    their case, but among "A" and "a" each takes its own. What cannot be used, words too, is listed in the store's manifest.

    Args:
        source: the root of a folder as published, a parquet file, or a folder with parquet files in it.
        out: folder of the store.
        samples: see `lavender.data.read_samples`; their pictures are opened.
        images: folder of the pictures. A folder as published has none, so it needs this, or `samples`.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: nothing says where the pictures are.
        DataError: `source` holds no published maps.
        TargetError: `out` holds something else, or another process writes it; the disk is full.
        Stopped: the process was asked to end by SIGTERM or SIGUSR1.
    """
    rows = _open(Path(source))
    folder = None if images is None else Path(images)
    if samples is None and folder is None and isinstance(rows, _FolderRows):
        raise ConfigError(f"{source} holds maps but no pictures; give the folder of the pictures (--images) or samples (--samples)")
    owners = _Owners(samples, folder, rows)
    size, digest, captions = _look_through(rows, progress)
    origin = {"model": "published", "source": Path(source).absolute().name, "weights": digest}
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    with stopping() as stop, TargetWriter(Path(out), origin, StoreConfig(map_size=size)) as writer:
        writer.begin_run()

        def fail(sample_id: str, reason: str) -> None:
            writer.fail(sample_id, reason)
            tqdm.write(f"skipped {sample_id}: {reason}")

        for row in tqdm(rows, desc="word maps", unit="picture", disable=not progress):
            if stop.requested:
                raise Stopped(f"ended by {stop.named()}, {counts['written']} samples written; the same command continues")
            try:
                samples_of_row = owners.of(row, captions[row.name] > 1)
            except DataError as error:
                counts["failed"] += 1
                fail(row.name, str(error))
                continue
            maps, reasons = _maps_of(row, rows.root, size, [caption for _, _, caption in samples_of_row])
            for reason in reasons:
                counts["unused"] += 1
                writer.fail(samples_of_row[0][0] if len(samples_of_row) == 1 else row.name, reason)
            for sample_id, source_image, caption in samples_of_row:
                try:
                    if sample_id in seen:
                        raise DataError("another row has maps of this sample too")
                    seen.add(sample_id)
                    require_unicode(sample_id, "the id")
                    require_unicode(caption, "the caption")
                    word_maps = _word_maps(caption, maps)
                    if writer.has(sample_id, source_image, caption):
                        counts["present"] += 1
                        continue
                    picture = Picture.open(source_image)
                except DataError as error:
                    counts["failed"] += 1
                    fail(sample_id, str(error))
                    continue
                writer.add(Target(sample_id, picture.sha256, word_maps, picture.file_sha256))
                counts["written"] += 1
        writer.close()
    return Imported(counts["written"], counts["present"], counts["failed"], counts["unused"])


class _Owners:
    """Who gets the maps of a row: ids, pictures and captions."""

    def __init__(
        self, samples: Iterable[Sample | Conversation] | None, images: Path | None, rows: _FolderRows | _ParquetRows
    ) -> None:
        self._images = images
        self._root = rows.root
        self._numbers: Counter[str] = Counter()
        self._known: dict[str, list[tuple[str, ImageSource, tuple[str, ...]]]] | None = None
        if samples is not None:
            self._known = {}
            for sample in samples:
                for image in images_of(sample):
                    owner = (sample.id, image, _answers_of(sample))
                    self._known.setdefault(name_of(image, sample.id), []).append(owner)

    def of(self, row: _Row, several: bool) -> list[tuple[str, ImageSource, str]]:
        """Id, picture and caption of all that share a row. Raises `DataError` if nobody does, or if there is no picture.

        `several` says whether the row's picture has more captions than this one in the set.
        """
        if not row.maps:
            raise DataError("there are no maps for this picture")
        words = [word for word, _ in row.maps]
        if self._known is None:
            image = self._picture(row)
            captions = row.answers or (" ".join(words),)
            ids = []
            for _ in captions:
                ids.append(f"{row.name}#{self._numbers[row.name]}" if several else row.name)
                self._numbers[row.name] += 1
            return [(sample_id, image, caption) for sample_id, caption in zip(ids, captions, strict=True)]
        known = self._known.get(row.name, [])
        if not known:
            raise DataError("no sample has a picture of this name")
        paths = {Path(image) for _, image, _ in known if isinstance(image, str | Path)}
        if len(paths) > 1:
            raise DataError(f"the samples have several pictures of this name: {', '.join(sorted(map(str, paths)))}")
        texts = {answer.strip() for answer in row.answers}
        same = [owner for owner in known if texts & {answer.strip() for answer in owner[2]}]
        return [(sample_id, image, _fullest(answers, words)) for sample_id, image, answers in same or known]

    def _picture(self, row: _Row) -> ImageSource:
        if isinstance(row.image, bytes):
            return row.image
        folders = [folder for folder in (self._images, self._root) if folder is not None]
        for folder in folders:
            for name in filter(None, (row.image, row.name)):
                with suppress(DataError):  # a set may name pictures where its makers had them
                    path = Path(path_within(folder, name, row.name))
                    if os.path.isfile(path):  # which a path too long for the system is not, either
                        return path
        raise DataError(f"there is no picture {row.name} in {' or '.join(map(str, folders))}; give its folder (--images)")


def _answers_of(sample: Sample | Conversation) -> tuple[str, ...]:
    if isinstance(sample, Sample):
        return (sample.answer,)
    return tuple(message.content for message in sample.messages if message.role == "assistant")


def _fullest(answers: Sequence[str], words: Sequence[str]) -> str:
    """The answer that has most of the words, the first of them."""
    return max(answers, key=lambda answer: sum(bool(places) for places in match_words(answer, words)))


def _look_through(rows: _FolderRows | _ParquetRows, progress: bool) -> tuple[int, str, Counter[str]]:
    """The side of most maps, a fingerprint of all of them, and the number of captions of each picture."""
    sizes: Counter[tuple[int, ...]] = Counter()
    captions: Counter[str] = Counter()
    digest = hashlib.sha256()
    for row in tqdm(rows, desc="reading maps", unit="picture", disable=not progress):
        captions[row.name] += max(1, len(row.answers))
        for word, source in row.maps:
            try:
                values = _grey(source, rows.root)
            except DataError:
                continue
            sizes[values.shape] += 1
            digest.update(f"{row.name}\0{word}\0{values.shape}".encode("utf-8", "surrogatepass") + values.tobytes())
    square = [shape[0] for shape, _ in sizes.most_common() if shape[0] == shape[1]]
    if not square:
        raise DataError(f"{rows.root} has no map that can be read; expected square grey pictures, one for each word")
    return square[0], digest.hexdigest()[:16], captions


def _grey(source: bytes | str, root: Path) -> NDArray[np.uint8]:
    image = source if isinstance(source, bytes) else path_within(root, source, "the set's own file", "put the map there")
    return np.asarray(load_image(image).convert("L"))


def _maps_of(row: _Row, root: Path, size: int, captions: Sequence[str]) -> tuple[list[tuple[str, NDArray[np.float32]]], list[str]]:
    """A row's usable maps [size, size] in [0, 1] with their words, and why others are not usable."""
    places_per_caption = [match_words(caption, [word for word, _ in row.maps]) for caption in captions]
    usable: list[tuple[str, NDArray[np.float32]]] = []
    reasons = []
    for n, (word, source) in enumerate(row.maps):
        if not any(places[n] for places in places_per_caption):
            reasons.append(f"the word {word!r} is not in {' or '.join(map(repr, captions))}")
            continue
        try:
            values = _grey(source, root)
        except DataError as error:
            reasons.append(f"the map of {word!r} cannot be used: {error}")
            continue
        if values.shape != (size, size):
            reasons.append(f"the map of {word!r} has {values.shape[0]}x{values.shape[1]} places; most have {size}x{size}")
            continue
        usable.append((word, np.divide(values, 255, dtype=np.float32)))
    return usable, reasons


def _word_maps(caption: str, maps: Sequence[tuple[str, NDArray[np.float32]]]) -> WordMaps:
    """Every word of a caption with its map, rows of NaN without. Raises `DataError` if none has one."""
    texts = [text for text, _ in maps]
    words = sorted(set(words_and(caption, texts)), key=lambda word: (word.start, word.end))
    places = match_words(caption, texts)
    rows = []
    for word in words:
        candidates = [(text == word.text, values) for (text, values), same in zip(maps, places, strict=True) if word in same]
        # Where both "A" and "a" have a map, each has its own.
        chosen = [values for exact, values in candidates if exact] or [values for _, values in candidates]
        rows.append(np.mean(chosen, axis=0) if chosen else None)
    mapped = [row for row in rows if row is not None]
    if not mapped:
        raise DataError(f"no word of the caption {caption!r} has a map")
    missing = np.full_like(mapped[0], np.nan)
    return WordMaps(caption, tuple(words), np.stack([missing if row is None else row for row in rows]))


def _open(source: Path) -> _FolderRows | _ParquetRows:
    if not os.path.exists(source):
        raise DataError(f"there is nothing at {source}; expected a folder of published maps, or a parquet file")
    if source.is_dir():
        names = sorted(child.name for child in source.iterdir() if (child / "lpm_attention").is_dir())
        if names:
            return _FolderRows(source, names)
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() == ".parquet") if source.is_dir() else [source]
    if not files:
        raise DataError(
            f"{source} has no maps: expected <picture>/lpm_attention/<stem>/attention_<word>.jpg in it, or parquet files"
        )
    return _ParquetRows(source if source.is_dir() else source.parent, files)


class _FolderRows:
    """The pictures of a folder as published, one row each."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root = root
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[_Row]:
        for name in self._names:
            # The authors' code reads every folder below, whatever its name.
            files = sorted((self.root / name / "lpm_attention").glob("*/attention_*.jpg"))
            words = tuple((file.name[len("attention_") : -len(".jpg")], str(file.relative_to(self.root))) for file in files)
            yield _Row(name, None, (), words)


class _ParquetRows:
    """The rows of parquet tables as published. Raises `DataError` if they are none."""

    def __init__(self, root: Path, files: list[Path]) -> None:
        self.root = root
        self._files = files
        self._length = 0
        for file in files:
            with _table(file) as table:
                schema, rows = table.schema_arrow, table.metadata.num_rows
            if "attention_images" not in schema.names or "image" not in schema.names:
                raise DataError(
                    f"{file} has the columns {', '.join(schema.names)}; expected image, question, answers and attention_images"
                )
            _require_words(schema.field("attention_images").type, file)
            self._length += rows

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_Row]:
        number = 0
        for file in self._files:
            with _table(file) as table:
                columns = [name for name in ("image", "answers", "attention_images") if name in table.schema_arrow.names]
                for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
                    answers = batch["answers"].to_pylist() if "answers" in columns else [None] * len(batch)
                    for image, answer, pairs in zip(
                        batch["image"].to_pylist(), answers, _pairs_of(batch["attention_images"]), strict=True
                    ):
                        yield self._row(number, image, answer, pairs)
                        number += 1

    def _row(self, number: int, image: Any, answers: Any, pairs: list[tuple[str, Any]]) -> _Row:
        data, path = _image_of(image)
        texts = answers if isinstance(answers, list) else [answers]
        maps: list[tuple[str, bytes | str]] = []
        for word, value in pairs:
            own_data, own_path = _image_of(value)
            source = own_data if own_data is not None else own_path
            if source is not None:
                maps.append((word, source))
        return _Row(
            PurePosixPath(path or str(number)).name,
            data if data is not None else path,
            tuple(text for text in texts if isinstance(text, str) and text.strip()),
            tuple(maps),
        )


@contextmanager
def _table(file: Path) -> Iterator[pq.ParquetFile]:
    """A table to read from. Raises `DataError` if it is none, or damaged."""
    try:
        open_regular(file).close()
        with pq.ParquetFile(file) as table:
            yield table
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is no parquet file ({str(error).splitlines()[0]})") from None


def _require_words(kind: pa.DataType, file: Path) -> None:
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if listed and pa.types.is_struct(kind.value_type) and {"word", "image"} <= {field.name for field in kind.value_type}:
        return
    if not (pa.types.is_struct(kind) or pa.types.is_map(kind)):
        raise DataError(f"{file}: attention_images is {kind}; expected words with their pictures, or a list of {{word, image}}")


def _pairs_of(column: pa.Array) -> list[list[tuple[str, Any]]]:
    """Per row its words, each with its picture as the file has it."""
    if pa.types.is_map(column.type):
        return [pairs or [] for pairs in column.to_pylist()]
    if not pa.types.is_struct(column.type):
        return [[(pair["word"], pair["image"]) for pair in listed or []] for listed in column.to_pylist()]
    # By word: a struct has all words of the table, and a row pictures for a few of them.
    rows: list[list[tuple[str, Any]]] = [[] for _ in range(len(column))]
    for field, values in zip(column.type, column.flatten(), strict=True):
        for row in np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False)):
            rows[row].append((field.name, values[row].as_py()))
    return rows


def _image_of(value: Any) -> tuple[bytes | None, str | None]:
    """The bytes and the path of a picture, as `datasets` writes it, or one of the two alone."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
    return (data if isinstance(data, bytes) and data else None, path if isinstance(path, str) and path else None)

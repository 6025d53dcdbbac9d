"""Tables as people write them: CSV of every dialect, and rows that cannot be used one by one."""

from __future__ import annotations

import csv
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavender.data.samples import Pair, read_pairs
from lavender.data.sources import BadPair, open_pairs
from lavender.errors import ConfigError, DataError

from .forms import as_csv, require_world

CAPTIONS = ['A "red", cat', "two\nlines", "naïve; fiancée", "🦓 | 🎻", "  spaces ", "NA", "12", "'s", ""]


def found(path, **options):
    return [(e.id, e.caption if isinstance(e, Pair) else e.reason) for e in open_pairs(path, **options)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_csv_that_pandas_writes_is_read_as_pandas_reads_it(tmp_path, delimiter, encoding):
    table = pd.DataFrame({"image": [f"{n}.png" for n in range(len(CAPTIONS))], "caption": CAPTIONS, "more": 1.5})
    for name in ("a.csv", "a.tsv"):
        table.to_csv(tmp_path / name, sep=delimiter, encoding=encoding, index=False)
        own = pd.read_csv(
            tmp_path / name, sep=delimiter, encoding=encoding, keep_default_na=False, dtype=str, skipinitialspace=True
        )
        assert found(tmp_path / name) == list(zip(own["image"], own["caption"], strict=True))
        assert [caption.lstrip() for _, caption in found(tmp_path / name)] == [caption.lstrip() for caption in CAPTIONS]
        assert open_pairs(tmp_path / name).count == len(CAPTIONS)
        assert read_pairs(tmp_path / name)[0].image == tmp_path / "0.png"


def test_rows_that_cannot_be_used_are_named_one_by_one(tmp_path):
    rows = [
        b"image, caption , id", b"a.png, A cat., 1", b"b.png,A cat, in a hat,2", b"", b'c.png,"A cat, in a hat",3', b",A cat.,4",
        b"e.png", b"../f.png,A cat.,6", b"g.png,A z\xe4bra.,7", b"h.png,A dog.,1", b'i.png,"A bird.,9', b"j.png,A cow.,10",
    ]  # fmt: skip
    (tmp_path / "a.csv").write_bytes(b"\r\n".join(rows))
    entries = found(tmp_path / "a.csv")
    assert entries[:5] == [
        ("1", "A cat."),
        ("a.csv#1", "line 3 has 4 cells, expected 3; put a caption with ',' in it in quotes"),
        ("3", "A cat, in a hat"),
        ("4", "no picture; expected encoded bytes or a path, found a str"),
        ("e.png", "no caption; expected a text or a list of texts, found none"),
    ]
    by_id = dict(entries)
    assert "is not in" in by_id["6"]
    assert by_id["a.csv#6"] == "line 9 is no text in UTF-8; save the file as UTF-8"
    assert [reason for own_id, reason in entries if own_id == "1"][1].startswith("the id occurs twice")
    assert entries[-1][1].startswith("the rest of the file cannot be read, from line ")
    assert len(entries) == 9


@pytest.mark.parametrize(
    ("header", "error", "message"),
    [
        ("image,caption,text", ConfigError, r"2 columns of captions \(caption, text\); name the one to take \(--caption-column\)"),
        ("image,img,text", ConfigError, r"2 columns of pictures \(image, img\); name the one to take \(--image-column\)"),
        ("filename,image_path,text", ConfigError, r"2 columns of pictures \(filename, image_path\)"),
        ("image,caption,caption", ConfigError, r"2 columns of captions \(caption, caption\); give each column a name of its own"),
        ("image,label", ConfigError, r"no column of captions \(caption or .*\); it has image, label\. .*--caption-column"),
        ("a.png,A cat.", ConfigError, r"no column of pictures .*; it has a\.png, A cat\."),
        ("", ConfigError, r"no column of pictures"),
        ("image,caption", DataError, r"a\.csv has no rows"),
    ],
)  # fmt: skip
def test_what_is_ambiguous_or_empty_is_one_line(tmp_path, header, error, message):
    (tmp_path / "a.csv").write_text(header + ("" if error is DataError else "\na.png,b,c"))
    for read in (open_pairs, read_pairs):
        with pytest.raises(error, match=message) as caught:
            read(tmp_path / "a.csv")
        assert "\n" not in str(caught.value)


def test_the_column_that_is_named_is_taken(tmp_path):
    (tmp_path / "a.csv").write_text("image,file_name,caption,text,key\nx.png,y.png,one,two,k\n")
    assert found(tmp_path / "a.csv", caption_column="text") == [("x.png", "two")]
    named = {"image_column": "file_name", "caption_column": "caption", "id_column": "key"}
    assert found(tmp_path / "a.csv", **named) == [("k", "one")]


def test_two_captions_columns_of_parquet_are_not_chosen_between(tmp_path):
    pq.write_table(pa.table({"image": [b"x"], "file_name": ["a.png"], "caption": ["one"], "text": ["two"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"2 columns of captions \(caption, text\)"):
        open_pairs(tmp_path / "a.parquet")
    assert found(tmp_path / "a.parquet", caption_column="text") == [("a.parquet#0", "two")]


def test_a_table_without_rows_is_refused(tmp_path):
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has no rows"):
        open_pairs(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("image,caption\n../a.png,A cat.\n")
    with pytest.raises(DataError, match=r"none of the 1 rows of .*a\.csv can be used; the first, \.\./a\.png: .* is not in"):
        open_pairs(tmp_path / "a.csv")


def test_a_picture_in_several_rows_has_several_captions(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\na.png,one\nb.png,two\na.png,three\na.png,four\n")
    assert found(tmp_path / "a.csv", captions="all") == [
        ("a.png", "one"),
        ("b.png", "two"),
        ("a.png#1", "three"),
        ("a.png#2", "four"),
    ]
    first = list(open_pairs(tmp_path / "a.csv"))
    assert [type(entry) for entry in first] == [Pair, Pair, BadPair, BadPair]
    assert "the picture occurs twice; take all of its captions (--captions all)" in first[2].reason


def test_several_csv_files_by_a_pattern(world, tmp_path):
    as_csv(world[:2], tmp_path / "data", name="a.csv")
    as_csv(world[2:], tmp_path / "data/more", name="b.csv")
    ids = require_world(open_pairs(tmp_path / "data/*.csv"), world[:2])
    assert ids == ["images/00000.png", "images/00001.png"]
    both = list(open_pairs(str(tmp_path / "data/**/*.csv")))
    assert [getattr(entry, "caption", None) for entry in both][:2] == [world[0].caption, world[1].caption]


def test_json_lines_with_the_names_of_a_metadata_file(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "A cat."}))
    assert found(tmp_path / "metadata.jsonl") == [("a.png", "A cat.")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12), min_size=1, max_size=5))
def test_every_text_in_quotes_is_itself(tmp_path, captions):
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(
            [["image", "text"], *([f"{n}.png", text] for n, text in enumerate(captions))]
        )
    assert found(tmp_path / "a.csv") == [(f"{n}.png", text) for n, text in enumerate(captions)]


def test_blanks_around_paths_and_ids_are_no_part_of_them(tmp_path):
    """As around the names of columns; a caption is kept as it stands."""
    (tmp_path / "a.csv").write_text('id , image , caption \n1 , a.png\t, A cat. \n"2 ", "b.png ",A dog.\n')
    assert found(tmp_path / "a.csv") == [("1", "A cat. "), ("2", "A dog.")]
    assert [pair.image for pair in open_pairs(tmp_path / "a.csv")] == [tmp_path / "a.png", tmp_path / "b.png"]
    (tmp_path / "b.csv").write_text("image,caption\na.png ,A cat.\nb.png  ,A dog.\n")
    assert found(tmp_path / "b.csv") == [("a.png", "A cat."), ("b.png", "A dog.")]
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png ,A cat.\n")
    assert found(tmp_path) == [("a.png", "A cat.")]

"""Documents come out in a fixed order, and every bad input is one sentence that names it."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_llm.config import SourceConfig
from moe_llm.data import rows
from moe_llm.data.sources import check_sources, fingerprint, list_files, read_documents
from moe_llm.errors import UserError

FIELD = "data.sources.0"


def files(path, **settings):
    return SourceConfig(type="files", path=str(path) if not isinstance(path, list) else path, **settings)


def read(path, **settings):
    return list(read_documents(files(path, **settings), FIELD))


def test_stdlib_is_real_text_in_a_fixed_order():
    source = SourceConfig(type="python_stdlib")
    paths = list_files(source, FIELD)
    assert paths == sorted(paths)
    assert any(p.name == "argparse.py" for p in paths)
    assert not any("site-packages" in p.parts for p in paths)
    documents = list(read_documents(source, FIELD))
    assert sum(map(len, documents)) > 5_000_000
    assert documents == list(read_documents(source, FIELD))


def test_patterns_lists_and_subdirectories(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "sub/c.txt"]
    assert read([str(tmp_path / "b.txt"), str(tmp_path / "*.txt")]) == ["b.txt", "a.txt"]


def test_text_is_taken_as_it_is(tmp_path):
    text = "\n  two\r\nlines\twith  spaces \n\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(tmp_path / "a.txt") == [text]
    assert read(tmp_path / "a.txt", document="line") == ["  two", "lines\twith  spaces "]


def test_gzip_jsonl_and_parquet_hold_the_same_documents(tmp_path):
    texts = [f"document {i}\nnäive" for i in range(600)]
    lines = "".join(json.dumps({"id": i, "body": t}) + "\n\n" for i, t in enumerate(texts))
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    pq.write_table(pa.table({"id": range(600), "body": texts}), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert read(tmp_path / name, text_field="body") == texts


def test_hub_reads_a_dataset_directory(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5)))
    source = SourceConfig(type="hub", path=str(tmp_path))
    assert list(read_documents(source, FIELD)) == [f"row {i}" for i in range(5)]
    with pytest.raises(UserError, match=r"text_field=body .* it has text"):
        list(read_documents(source.model_copy(update={"text_field": "body"}), FIELD))
    with pytest.raises(UserError, match=r"split=nope\) cannot be loaded"):
        list(read_documents(source.model_copy(update={"split": "nope"}), FIELD))


@pytest.mark.parametrize("several", [False, True])
def test_hub_reads_what_save_to_disk_wrote(tmp_path, several):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    (datasets.DatasetDict(train=rows) if several else rows).save_to_disk(tmp_path / "saved")
    assert list(read_documents(SourceConfig(type="hub", path=str(tmp_path / "saved")), FIELD)) == ["one", "two"]
    if several:
        with pytest.raises(UserError, match=r"split=test.*cannot be loaded"):
            list(read_documents(SourceConfig(type="hub", path=str(tmp_path / "saved"), split="test"), FIELD))


def test_hub_out_of_reach_is_one_sentence(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'no/such' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"data\.sources\.0\.path=no/such .*Couldn't reach.*local files$"):
        list(read_documents(SourceConfig(type="hub", path="no/such"), FIELD))


@pytest.mark.parametrize("line_ends", [True, False])
def test_large_file_is_cut_into_documents_that_together_are_the_file(tmp_path, monkeypatch, line_ends):
    monkeypatch.setattr(rows, "SEGMENT_BYTES", 64)
    text = ("näïve 漢字 😀 words" + ("\n" if line_ends else "")) * 40
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    documents = read(tmp_path / "a.txt")
    assert "".join(documents) == text
    assert len(documents) > 5
    assert all(d.endswith("\n") for d in documents) == line_ends


def test_undecodable_byte_is_located_beyond_the_first_segment(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "SEGMENT_BYTES", 64)
    (tmp_path / "a.txt").write_bytes(b"good line\n" * 30 + b"bad \xff\n")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 at byte 304: "):
        read(tmp_path / "a.txt")


BAD = {
    "missing": ("missing.txt", None, {}, r"path=.*missing\.txt does not exist: "),
    "no match": ("*.nothing", None, {}, r"\*\.nothing matches no file: "),
    "empty": ("a.txt", b"", {}, r"the file .*a\.txt is empty"),
    "only blank lines": ("a.txt", b"\n\n", {"document": "line"}, r"holds no text"),
    "undecodable": ("a.txt", b"abc\xe9", {}, r"a\.txt is not UTF-8 at byte 3: "),
    "undecodable line": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', {}, r"is not UTF-8 at line 2: "),
    "UTF-16 without a mark": ("a.txt", "some text".encode("utf-16-le"), {}, r"a\.txt holds a zero byte in every tenth"),
    "tokens without an index": ("a.bin", bytes([7, 0, 9, 0]) * 50, {}, r"a\.bin holds a zero byte .*\.idx"),
    "not json": ("a.jsonl", b'{"text": "a"}\n{"text": \n', {}, r"a\.jsonl, line 2 is not valid JSON"),
    "not an object": ("a.jsonl", b"[1]\n", {}, r"is no JSON object"),
    "no column": (
        "a.jsonl",
        b'{"id": 1, "body": "a"}\n',
        {},
        r"line 1 has no column .text.: set .*text_field to one of id, body",
    ),
    "not text": ("a.jsonl", b'{"text": null}\n', {}, r"line 1: 'text' holds null where text is expected"),
    "half a surrogate": ("a.jsonl", b'{"text": "a\\ud800"}\n', {}, r"half of a surrogate .* character 1"),
    "not parquet": ("a.parquet", b"PAR1nonsense", {}, r"a\.parquet is not a readable parquet file"),
    "not gzip": ("a.txt.gz", b"\x00\x01\x02", {}, r"a\.txt\.gz cannot be read .*gzip"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(tmp_path, name):
    filename, content, settings, pattern = BAD[name]
    if content is not None:
        (tmp_path / filename).write_bytes(content)
    with pytest.raises(UserError, match=pattern) as caught:
        read(tmp_path / filename, **settings)
    assert str(caught.value).startswith(FIELD)
    assert "\n" not in str(caught.value)


def test_truncated_gzip_and_missing_parquet_column(tmp_path):
    whole = gzip.compress(b"some text\n" * 1000)
    (tmp_path / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.txt\.gz cannot be read"):
        read(tmp_path / "a.txt.gz")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "c.parquet")
    expected = rf"^{FIELD}: .*c\.parquet has no column 'text': set {FIELD}\.text_field to body$"
    with pytest.raises(UserError, match=expected):
        read(tmp_path / "c.parquet")


@pytest.mark.parametrize("pattern", ["pipe.txt", "/dev/null", "/dev/zero"])
def test_pipes_and_devices_are_refused_before_anything_waits_for_them(tmp_path, make_config, pattern):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "a.txt").write_text("text")
    paths = [str(tmp_path / "a.txt"), str(tmp_path / pattern)]
    with pytest.raises(UserError, match=rf"{pattern} is a pipe or a device"):
        check_sources(make_config([{"type": "files", "path": paths}]))


def test_a_pattern_that_matches_a_link_to_nothing_names_it_and_passes_over_pipes_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").mkdir()
    os.mkfifo(tmp_path / "c.txt")
    assert read(tmp_path / "*.txt") == ["text"]
    (tmp_path / "d.txt").symlink_to("gone")
    with pytest.raises(UserError, match=r"\*\.txt matches .*d\.txt, a link to gone, which is not there"):
        read(tmp_path / "*.txt")


def test_a_file_under_two_names_is_reported(tmp_path, make_config, caplog):
    (tmp_path / "a.txt").write_text("text")
    check_sources(make_config([{"type": "files", "path": [str(tmp_path / "a.txt"), str(tmp_path / "*.txt")]}]))
    assert not caplog.records, "one name given twice is one file"
    (tmp_path / "b.txt").symlink_to("a.txt")
    check_sources(make_config([{"type": "files", "path": str(tmp_path / "*.txt")}]))
    assert "a.txt and " in caplog.text
    assert "b.txt are one file, which is read twice" in caplog.text


def test_check_is_about_existence_and_directories(tmp_path, make_config):
    with pytest.raises(UserError, match=r"data\.sources\.0\.path=.* is a directory: name its files"):
        check_sources(make_config([{"type": "files", "path": str(tmp_path)}]))
    (tmp_path / "a.txt").write_text("text")
    good = {"type": "files", "path": str(tmp_path / "a.txt")}
    check_sources(make_config([good, {"type": "python_stdlib"}]))
    with pytest.raises(UserError, match=r"data\.validation_sources\.0\.path=.*does not exist"):
        check_sources(
            make_config(
                [good],
                data={
                    "sources": [good],
                    "validation_sources": [{"type": "files", "path": str(tmp_path / "b.txt")}],
                },
            )
        )


def test_fingerprint_follows_the_text_not_the_copy(tmp_path):
    for name, text in (("a/x.txt", "same"), ("b/x.txt", "same"), ("c/x.txt", "diff")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    a, b, c = (fingerprint(files(tmp_path / d / "x.txt"), FIELD, tmp_path) for d in "abc")
    assert a == b != c
    assert fingerprint(files(tmp_path / "a" / "x.txt", document="line"), FIELD, tmp_path) != a
    assert fingerprint(files(tmp_path / "a" / "x.txt", weight=2), FIELD, tmp_path) == a

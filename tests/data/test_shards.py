"""A large source is tokenised in shards, by several processes or machines, to what one reader would make of it."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_llm.config import SourceConfig
from moe_llm.data import cache, hashes, pieces, rows, shard_worker, shards
from moe_llm.data.sharded_array import ShardedArray
from moe_llm.data.shards import Share, cached_tokens, tokenise_share
from moe_llm.data.sources import fingerprint, read_documents, read_records, shards_of
from moe_llm.data.split import HoldOut
from moe_llm.errors import UserError

FIELD = "data.sources.0"
DIVIDE = HoldOut(below=2**61)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(pieces, "SHARD_BYTES", 2000)


def lines(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return ["漢é x\u2028y "[: rng.randrange(9)] * rng.randrange(40) for _ in range(count)]


def write(tmp_path: Path, kind: str, texts: list[str]) -> Path:
    path = tmp_path / f"text.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
    elif kind.startswith("jsonl"):
        content = "\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
        path.write_bytes(gzip.compress(content.encode()) if kind.endswith("gz") else content.encode())
    else:
        path.write_bytes("\r\n".join(texts).encode())
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("seed", range(4))
def test_the_pieces_of_a_file_hold_each_of_its_documents_once(tmp_path, monkeypatch, kind, seed):
    texts = lines(seed, 120)
    source = SourceConfig(type="files", path=str(write(tmp_path, kind, texts)), document="line")
    monkeypatch.setattr(pieces, "SHARD_BYTES", random.Random(seed).choice([50, 300, 2000]))
    monkeypatch.setattr(pieces, "_WINDOW", 64)
    assert list(read_documents(source, FIELD)) == [text for text in texts if text]
    parts = shards_of(source, FIELD)
    assert (len(parts) > 3) == (kind != "jsonl.gz"), "what is packed is read from its begin"


@pytest.mark.parametrize("line_ends", [True, False])
def test_the_pieces_of_one_large_text_are_the_text(tmp_path, monkeypatch, line_ends):
    text = "".join(random.Random(1).choices("aé漢😀" + " " * 3 + "\n" * line_ends, k=4000))
    (tmp_path / "book.txt").write_bytes(text.encode())
    monkeypatch.setattr(pieces, "SHARD_BYTES", 700)
    monkeypatch.setattr(pieces, "_WINDOW", 50)
    monkeypatch.setattr(rows, "SEGMENT_BYTES", 200)
    documents = list(read_documents(SourceConfig(type="files", path=str(tmp_path / "book.txt")), FIELD))
    assert "".join(documents) == text
    assert max(len(d.encode()) for d in documents) <= 200


def test_a_line_of_a_later_piece_is_named_by_its_number_in_the_file(tmp_path, small_shards):
    texts = [json.dumps({"text": "word " * 20}) for _ in range(200)]
    texts[170] = '{"text": '
    (tmp_path / "text.jsonl").write_text("\n".join(texts))
    source = SourceConfig(type="files", path=str(tmp_path / "text.jsonl"))
    with pytest.raises(UserError, match=r"text\.jsonl, line 171 is not valid JSON"):
        list(read_documents(source, FIELD))
    (tmp_path / "text.jsonl").write_bytes("\n".join(texts).encode().replace(b'{"text": \n', b'{"text": "\xff"}\n'))
    with pytest.raises(UserError, match="is not UTF-8 at line 171:"):
        list(read_documents(source, FIELD))


def test_parquet_rows_of_a_later_piece_are_named_by_their_number_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "SHARD_BYTES", 100)
    path = write(tmp_path, "parquet", [f"text {i}" * 10 for i in range(50)])
    source = SourceConfig(type="files", path=str(path))
    assert [str(where) for where, _ in read_records(source, FIELD, ["text"])] == [
        f"{path}, row {i + 1}" for i in range(50)
    ]


def test_a_saved_dataset_is_read_in_shares_of_its_rows(tmp_path, monkeypatch):
    import datasets

    texts = [f"row {i} " * 20 for i in range(60)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setattr(pieces, "SHARD_BYTES", 3000)
    source = SourceConfig(type="hub", path=str(tmp_path / "saved"))
    parts = shards_of(source, FIELD)
    assert len(parts) > 2
    assert [text for part in parts for text in read_documents(source, FIELD, part)] == texts


@pytest.fixture
def source(tmp_path, make_text):
    texts = "".join(make_text(seed, 30).replace("\n", " ") + "\n" for seed in range(120))
    (tmp_path / "text.txt").write_text(texts, encoding="utf-8")
    return SourceConfig(type="files", path=str(tmp_path / "text.txt"), document="line")


def tokens(source, tokenizer, root, workers=1):
    return cached_tokens(source, FIELD, DIVIDE, tokenizer, cache_dir=str(root), num_workers=workers)


def content(texts) -> list[list[int]]:
    return [np.asarray(a).tolist() for t in texts.values() for a in (t.tokens_N, t.starts, t.sizes)]


def files(root) -> dict[str, bytes]:
    [entry] = root.glob("tokens-????????????????????????")
    return {str(path.relative_to(entry)): path.read_bytes() for path in entry.rglob("*") if path.is_file()}


@pytest.fixture
def expected(source, tokenizer, tmp_path):
    return content(tokens(source, tokenizer, tmp_path / "alone"))


def test_shards_hold_what_one_reader_makes_of_the_source(source, tokenizer, tmp_path, expected, small_shards):
    texts = tokens(source, tokenizer, tmp_path / "c")
    assert len(list((tmp_path / "c").glob("tokens-*/0*"))) > 4
    assert content(texts) == expected
    assert texts["validation"].documents > 2
    begin, end = 37, len(expected[0]) - 5
    assert texts["train"].tokens_N[begin:end].tolist() == expected[0][begin:end]


def test_the_bytes_do_not_depend_on_the_number_of_processes(source, tokenizer, tmp_path, expected, small_shards):
    tokens(source, tokenizer, tmp_path / "one", 1)
    assert content(tokens(source, tokenizer, tmp_path / "two", 2)) == expected
    assert files(tmp_path / "one") == files(tmp_path / "two")


class Killed(BaseException):
    """Ends a build as a signal does."""


def test_shards_that_are_done_before_a_kill_are_not_made_again(
    source, tokenizer, tmp_path, monkeypatch, expected, small_shards
):
    made, original = [], cache.Encoding.write

    def write(self, part, directory, **options):
        if len(made) == 3:
            raise Killed
        original(self, part, directory, **options)
        made.append(directory.name)

    with monkeypatch.context() as patch:
        patch.setattr(cache.Encoding, "write", write)
        with pytest.raises(Killed):
            tokens(source, tokenizer, tmp_path / "c")
    again = []
    monkeypatch.setattr(
        cache.Encoding, "write", lambda self, p, d, **o: (again.append(d.name), original(self, p, d, **o))
    )
    assert content(tokens(source, tokenizer, tmp_path / "c")) == expected
    assert len(made) == 3
    assert not set(made) & set(again)


def test_a_damaged_shard_is_named_and_made_again_alone(source, tokenizer, tmp_path, monkeypatch, caplog, small_shards):
    root = tmp_path / "c"
    tokens(source, tokenizer, root)
    before, again, original = files(root), [], cache.Encoding.write
    monkeypatch.setattr(
        cache.Encoding, "write", lambda self, p, d, **o: (again.append(d.name), original(self, p, d, **o))
    )
    [entry] = root.glob("tokens-????????????????????????")
    for seed in range(12):
        rng = random.Random(seed)
        name = rng.choice(sorted(name for name in before if before[name]))
        damaged = bytearray(before[name])
        damaged[rng.randrange(len(damaged))] ^= 1
        (entry / name).write_bytes(damaged)
        caplog.clear()
        again.clear()
        tokens(source, tokenizer, root)
        assert files(root) == before, name
        assert again == ([name.split("/")[0]] if "/" in name else []), name
        assert Path(name).name in caplog.text


def test_two_machines_that_share_nothing_make_one_entry(
    source, tokenizer, tmp_path, monkeypatch, expected, small_shards
):
    roots = [tmp_path / "first", tmp_path / "second"]
    counts = [
        tokenise_share(source, FIELD, DIVIDE, tokenizer, share=Share(i, 2), cache_dir=str(root), num_workers=1)
        for i, root in enumerate(roots)
    ]
    assert sum(mine for mine, _, _ in counts) == counts[0][1] > 4
    for shard in counts[1][2].iterdir():
        shard.rename(counts[0][2] / shard.name)
    monkeypatch.setattr(cache.Encoding, "write", lambda *args, **options: pytest.fail("encoded again"))
    assert content(tokens(source, tokenizer, roots[0])) == expected


def test_a_shard_that_another_machine_is_at_is_left_to_it(source, tokenizer, tmp_path, small_shards):
    from filelock import FileLock

    entry = shards.entry_of(source, FIELD, DIVIDE, tokenizer, tmp_path / "c", "all", False)
    entry.unfinished.mkdir(parents=True)
    task = shard_worker.ShardTask(
        0, shards_of(source, FIELD)[0], entry.unfinished / "00000", entry._lock_of(0), entry.directory
    )
    with FileLock(task.lock):
        assert not shard_worker.make_shard(entry.encoding, task, 1, lambda size: None, pytest.fail)
    assert shard_worker.make_shard(entry.encoding, task, 1, lambda size: None, pytest.fail)
    assert cache.is_whole(task.directory)


def test_a_bad_line_that_another_process_meets_is_one_sentence_and_leaves_nothing(tmp_path, tokenizer, small_shards):
    texts = [json.dumps({"text": "word " * 20}) for _ in range(200)]
    texts[170] = "{"
    (tmp_path / "text.jsonl").write_text("\n".join(texts))
    source = SourceConfig(type="files", path=str(tmp_path / "text.jsonl"))
    with pytest.raises(UserError, match=r"text\.jsonl, line 171 is not valid JSON"):
        tokens(source, tokenizer, tmp_path / "c", 2)
    assert not list((tmp_path / "c").glob("*tokens-*.unfinished"))


def test_a_worker_ends_with_the_process_that_sends_to_it():
    worker = subprocess.Popen(
        [sys.executable, "-m", "moe_llm.data.shard_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    worker.stdin.close()
    assert worker.wait(timeout=20) is not None
    worker.stdout.close()


@pytest.mark.parametrize("edit", ["copy", "content", "content of the same size and time"])
def test_large_files_are_known_by_content_and_read_once(tmp_path, monkeypatch, edit):
    monkeypatch.setattr(hashes, "REMEMBERED_BYTES", 10)
    monkeypatch.setattr(hashes, "COARSE_NS", 0)
    (tmp_path / "a").mkdir()
    path = tmp_path / "a/text.txt"
    path.write_text("one text of many bytes")
    source = SourceConfig(type="files", path=str(path))
    read, original = [], hashes._hash
    monkeypatch.setattr(hashes, "_hash", lambda p: read.append(p) or original(p))
    before = fingerprint(source, FIELD, tmp_path / "c")
    assert fingerprint(source, FIELD, tmp_path / "c") == before
    assert len(read) == 1
    if edit == "copy":
        (tmp_path / "b").mkdir()
        copy = tmp_path / "b/text.txt"
        copy.write_bytes(path.read_bytes())
        assert fingerprint(SourceConfig(type="files", path=str(copy)), FIELD, tmp_path / "c") == before
    else:
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_text("one text of fewer byte" if edit == "content" else "ten texts of any bytes")
        if edit != "content":
            assert path.stat().st_size == 22
            os.utime(path, ns=times)
        assert fingerprint(source, FIELD, tmp_path / "c") != before


def test_a_sharded_array_gives_what_the_whole_one_gives():
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 3, n).astype(np.uint16) for n in (5, 0, 1, 7, 0)]
    whole = np.concatenate(parts)
    array = ShardedArray([len(p) for p in parts], np.uint16, parts.__getitem__)
    assert len(array) == len(whole)
    for begin in range(-3, 15):
        for end in range(-3, 16):
            assert array[begin:end].tolist() == whole[begin:end].tolist()
    assert [array[i] for i in range(-13, 13)] == [whole[i] for i in range(-13, 13)]
    assert array.count_nonzero == np.count_nonzero(whole)
    assert np.asarray(array).dtype == np.uint16


def test_a_log_gets_share_rate_and_time_left(monkeypatch, caplog):
    clock = iter([0.0, 10.0, 40.0])
    monkeypatch.setattr(shards, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    advance = shards._log_progress(FIELD, 400_000_000)
    advance(50_000_000)
    assert not caplog.messages, "a line every 30 seconds"
    advance(50_000_000)
    assert caplog.messages == [f"tokenising {FIELD}: 100 of 400 MB, 2.5 MB/s, 2 min left"]

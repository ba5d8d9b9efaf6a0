"""The cache holds every document once, is complete or absent, and is built by one process."""

import errno
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from moe_llm import atomic
from moe_llm.config import SourceConfig
from moe_llm.data import cache as cache_module
from moe_llm.data import files, hashes
from moe_llm.data.cache import DocumentEncoder
from moe_llm.data.shards import cached_tokens
from moe_llm.data.sources import read_documents
from moe_llm.data.split import HoldOut, choose_holdout
from moe_llm.data.tokenizer import load_tokenizer, save_tokenizer
from moe_llm.errors import UserError

FIELD = "data.sources.0"


@pytest.fixture
def source(tmp_path, make_text):
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        (tmp_path / "corpus" / f"{i:02}.txt").write_text(make_text(i, 20 + 10 * i), encoding="utf-8")
    return SourceConfig(type="files", path=str(tmp_path / "corpus" / "*.txt"))


def entries(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.suffix != ".lock")


def test_cache_is_the_documents(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_BATCH_BYTES", 3000)
    documents = list(read_documents(source, FIELD))
    holdout = choose_holdout(documents, 0.2)
    encoder = DocumentEncoder(tokenizer)
    texts = cached_tokens(source, FIELD, holdout, tokenizer, cache_dir=str(tmp_path / "c"))
    for index, split in enumerate(("train", "validation")):
        expected = [part for d in documents if (part := holdout.divide(d)[index])]
        text = texts[split]
        assert text.documents == len(expected) > 0
        assert text.tokens_N.dtype == np.uint16
        for i, document in enumerate(expected):
            ids = text.tokens_N[text.starts[i] : text.starts[i + 1]]
            assert ids.tolist() == encoder.encode([document])[0].tolist()
            assert tokenizer.decode(ids[1:-1].tolist()) == document
        assert text.sizes.tolist() == [len(d.encode()) for d in expected]
        assert text.bytes == sum(text.sizes)
        assert text.targets == sum(len(encoder.encode([d])[0]) - 1 for d in expected)


def test_result_does_not_depend_on_workers(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_BATCH_BYTES", 2000)
    contents = []
    for workers in (1, 4):
        root = tmp_path / f"c{workers}"
        cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(root), num_workers=workers)
        contents.append({p.relative_to(root): p.read_bytes() for p in root.rglob("*.*") if p.suffix != ".lock"})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 7


def test_built_once_and_again_when_an_input_changes(source, tokenizer, tmp_path, monkeypatch):
    builds = []
    original = cache_module._build
    monkeypatch.setattr(cache_module, "_build", lambda *a: (builds.append(1), original(*a)))

    def load(holdout=HoldOut()):  # noqa: B008 - frozen
        return cached_tokens(source, FIELD, holdout, tokenizer, cache_dir=str(tmp_path / "c"))

    load()
    load()
    assert len(builds) == 1
    load(HoldOut(below=2**63))
    assert len(builds) == 2
    (tmp_path / "corpus" / "00.txt").write_text("new text")
    load()
    assert len(builds) == 3


def test_wide_vocabularies_take_four_bytes(source, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    wide = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    wide.add_tokens([f"<extra{i}>" for i in range(2**16)])
    assert DocumentEncoder(wide).dtype == np.uint32
    assert DocumentEncoder(tokenizer).dtype == np.uint16
    ids = DocumentEncoder(wide).encode(["a <extra65535>"])[0]
    assert ids.max() == len(wide) - 1 > 2**16 - 1


def test_a_failure_leaves_nothing(source, tokenizer, tmp_path):
    (tmp_path / "corpus" / "99.txt").write_bytes(b"good \xff")
    with pytest.raises(UserError, match=r"99\.txt is not UTF-8 at byte 5"):
        cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / "c"))
    assert entries(tmp_path / "c") == []


def test_no_space_left_is_one_sentence_and_leaves_nothing(source, tokenizer, tmp_path, monkeypatch):
    def full(self, ids, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.SplitWriter, "write", full)
    with pytest.raises(UserError, match=r"^data\.cache_dir: no space left for .*: free some or choose another"):
        cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / "c"))
    assert entries(tmp_path / "c") == []


@pytest.fixture
def small_files_only():
    """No file of this process may grow beyond a page."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_the_size_of_files_is_one_sentence_and_leaves_nothing(source, tokenizer, tmp_path, small_files_only):
    with pytest.raises(UserError, match=r"^data\.cache_dir: .* cannot be written \(File too large\): choose another"):
        cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / "c"))
    assert entries(tmp_path / "c") == []


def test_a_tokenizer_that_the_disk_does_not_take_is_one_sentence(tokenizer, tmp_path, small_files_only):
    """`tokenizers` raises errors of its own."""
    with (
        pytest.raises(UserError, match=r"^run\.dir: .* cannot be written \(File too large\): choose another"),
        files.publish(tmp_path / "tokenizer", "run.dir") as temporary,
    ):
        save_tokenizer(tokenizer, temporary)
    assert not (tmp_path / "tokenizer").exists()


def test_a_cache_directory_that_cannot_be_is_one_sentence(source, tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"^data\.cache_dir: .* cannot be written"):
        cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / "file" / "c"))


def _build_in_process(source, tokenizer_dir, cache_dir, log, pause):
    original = cache_module.SplitWriter.write

    def slow(self, ids, size):
        original(self, ids, size)
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(pause)

    cache_module.SplitWriter.write = slow
    texts = cached_tokens(source, FIELD, HoldOut(), load_tokenizer(tokenizer_dir), cache_dir=str(cache_dir))
    assert texts["train"].documents == 40


def _start(*args):
    process = multiprocessing.get_context("spawn").Process(target=_build_in_process, args=args)
    process.start()
    return process


@pytest.mark.grid  # three processes that import everything
def test_killed_in_the_middle_then_two_at_once(source, tokenizer, tmp_path):
    log, cache_dir = tmp_path / "log", tmp_path / "c"
    victim = _start(source, tokenizer.name_or_path, cache_dir, log, 5.0)
    deadline = time.time() + 120
    while not log.exists() and time.time() < deadline:
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert len(entries(cache_dir)) == 1
    assert entries(cache_dir)[0].startswith("."), "a half cache never has its final name"

    log.unlink()
    both = [_start(source, tokenizer.name_or_path, cache_dir, log, 0.01) for _ in range(2)]
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    writers = log.read_text().split()
    assert len(writers) == 40, "documents were written once, by one of the two"
    assert len(set(writers)) == 1
    assert len(entries(cache_dir)) == 1
    assert entries(cache_dir)[0].startswith("tokens-")


@pytest.mark.parametrize("how", ["grows", "disappears"])
def test_a_file_that_changes_while_it_is_read_is_named_and_its_tokens_are_not_kept(
    source, tokenizer, tmp_path, monkeypatch, how
):
    """Their name in the cache is that of the content before."""
    victim, write = tmp_path / "corpus/07.txt", cache_module.SplitWriter.write

    def change(*arguments):
        if how == "disappears":
            victim.unlink(missing_ok=True)
        else:
            with victim.open("a") as file:
                file.write("more\n")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.SplitWriter, "write", change)
        with pytest.raises(UserError, match=r"07\.txt (has changed while it was tokenised|cannot be read)"):
            cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / "c"))
    assert not [name for name in entries(tmp_path / "c") if "tokens-" in name and not name.startswith("locks-")]
    text = cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / "c"))["train"]
    assert text.documents == (39 if how == "disappears" else 40)


def test_what_is_prepared_is_read_from_a_disk_that_is_only_read(source, tokenizer, tmp_path, monkeypatch, caplog):
    def read() -> list[int]:
        return cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / "c"))[
            "train"
        ].tokens_N.tolist()

    def refused(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(hashes, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr(cache_module, "COMPARED_BYTES", 0)
    expected = read()
    monkeypatch.setattr(atomic, "_reported", set())
    monkeypatch.setattr(files, "write_atomically", refused)
    monkeypatch.setattr(FileLock, "acquire", refused)
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    assert read() == expected
    for remembered in [*(tmp_path / "c").glob("hashes-*.json"), *(tmp_path / "c").rglob("verified.json")]:
        remembered.unlink()
    assert read() == expected
    assert len(caplog.records) == 1
    assert "Read-only file system" in caplog.text

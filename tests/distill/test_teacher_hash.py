"""The hash of a teacher's files follows their content, whatever their times say."""

import os

from moe_llm.data import hashes
from moe_llm.distill import cache
from moe_llm.distill.cache import teacher_hash


def make(directory, byte: bytes):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(byte * 100)


def test_a_file_of_the_same_size_whose_time_is_set_back_is_another_teacher(tmp_path, monkeypatch):
    for coarse in (0, hashes.COARSE_NS):  # whether the clock of the file system is to be trusted at once
        monkeypatch.setattr(hashes, "COARSE_NS", coarse)
        make(tmp_path / "teacher", b"a")
        first = teacher_hash(tmp_path / "teacher", tmp_path)
        assert teacher_hash(tmp_path / "teacher", tmp_path) == first
        file = tmp_path / "teacher/model.safetensors"
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        make(tmp_path / "teacher", b"b")
        os.utime(file, ns=times)
        assert teacher_hash(tmp_path / "teacher", tmp_path) != first


def test_files_that_have_not_changed_for_some_time_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "COARSE_NS", 0)
    make(tmp_path / "teacher", b"a")
    first = teacher_hash(tmp_path / "teacher", tmp_path)

    def read_again(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(cache.hashlib, "file_digest", read_again)
    assert teacher_hash(tmp_path / "teacher", tmp_path) == first

"""A file that is replaced is, at every moment, the old one or the new one."""

import errno
import os
from pathlib import Path

import pytest

from moe_llm import atomic
from moe_llm.atomic import rename_directory, write_atomically


@pytest.mark.parametrize("content", ["new é\n", b"\x00new"])
def test_a_file_gets_its_content_and_nothing_stays_beside_it(tmp_path, content):
    (tmp_path / "file").write_text("old")
    write_atomically(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fails):
    def failing(*arguments):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, fails, failing)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_content_is_on_the_disk_before_it_has_the_name_and_then_the_name_too(tmp_path, monkeypatch):
    order = watched(monkeypatch)
    write_atomically(tmp_path / "file", "new")
    assert order == [("fsync", ".tmp-"), ("replace", "file"), ("fsync", tmp_path.name)]


def test_a_directory_gets_its_name_when_its_names_are_on_the_disk_and_then_that_name_is_too(tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    order = watched(monkeypatch)
    rename_directory(tmp_path / "new", tmp_path / "final")
    assert order == [("fsync", "new"), ("rename", "final"), ("fsync", tmp_path.name)]


def watched(monkeypatch) -> list[tuple[str, str]]:
    """What is flushed and renamed from now on, by name; of temporary files how these begin."""
    order: list[tuple[str, str]] = []
    for kind in ("replace", "rename"):
        true = getattr(os, kind)
        monkeypatch.setattr(
            os, kind, lambda *paths, true=true, kind=kind: (order.append((kind, paths[1].name)), true(*paths))
        )

    def fsync(descriptor):
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        order.append(("fsync", ".tmp-" if name.startswith(".tmp-") else name))

    monkeypatch.setattr(os, "fsync", fsync)
    return order


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES])
def test_a_file_system_that_flushes_no_directories_is_reported_once(tmp_path, monkeypatch, caplog, code):
    monkeypatch.setattr(atomic, "_reported", set())
    true = os.fsync

    def refused(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        true(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    for content in ("a", "b"):
        write_atomically(tmp_path / "file", content)
    assert (tmp_path / "file").read_text() == "b"
    assert len(caplog.records) == 1
    assert os.strerror(code) in caplog.text

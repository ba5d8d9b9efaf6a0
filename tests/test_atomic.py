"""A file that is replaced is, at every moment, the old one or the new one."""

import os

import pytest

from moe_llm.atomic import write_atomically


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


def test_the_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    order, true = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append(("fsync", os.fstat(descriptor).st_size)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), true(*paths)))
    write_atomically(tmp_path / "file", "new")
    assert order == [("fsync", 3), "replace"]

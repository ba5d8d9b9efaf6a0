"""A damaged checkpoint costs no other one, and a file system that refuses conveniences ends no run."""

import errno
import json
import logging
import os
import shutil

import pytest
from support.checkpoints import FakeState, random_tensors, save_arguments
from support.training import MODEL

from moe_llm import atomic
from moe_llm.checkpoint import folder
from moe_llm.checkpoint.folder import complete_checkpoints
from moe_llm.checkpoint.resume import find_resumable
from moe_llm.checkpoint.space import check_space
from moe_llm.checkpoint.state import load_checkpoint, save_checkpoint
from moe_llm.config import ModelConfig
from moe_llm.errors import UserError

CONFIG = ModelConfig(**MODEL)


@pytest.fixture(autouse=True)
def nothing_reported_yet(monkeypatch):
    monkeypatch.setattr(atomic, "_reported", set())


def save(root, step: int, **changes):
    return save_checkpoint(
        root, FakeState(random_tensors(CONFIG, step)), **save_arguments(CONFIG, step=step, **changes)
    )


def names(root) -> list[str]:
    return [path.name for path in complete_checkpoints(root)]


def zero(path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


SMALL = [
    "trainer/state.json",
    "trainer/manifest.json",
    "config.json",
    "model.safetensors",
    "trainer/optimizer.safetensors",
]


@pytest.mark.parametrize("without_list", [False, True])
@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.parametrize("file", SMALL)
def test_a_damaged_checkpoint_never_costs_a_new_one_its_place(tmp_path, file, keep_last, without_list):
    save(tmp_path, 1)
    zero(tmp_path / "step-00000001" / file)
    if without_list:
        (tmp_path / "checkpoints.json").unlink()
    for step in (2, 3, 4, 5):
        path = save(tmp_path, step, keep_last=keep_last)
        assert path.is_dir(), "the checkpoint that has just been saved is gone"
        assert (tmp_path / "latest").resolve() == path
    sound = [name for name in names(tmp_path) if name != "step-00000001"]
    assert sound == [f"step-{step:08d}" for step in (5, 4)[:keep_last]]
    if not (without_list and file in ("trainer/state.json", "trainer/manifest.json")):  # its age is known
        assert "step-00000001" not in names(tmp_path), "a damaged one holds a place for ever"


def test_a_damaged_one_is_passed_over_by_name_and_the_one_before_is_taken(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    zero(tmp_path / "step-00000002/trainer/state.json")
    told = []
    assert find_resumable(tmp_path, report=told.append).name == "step-00000001"
    assert "step-00000002 is passed over" in told[0]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"checkpoints": {"step-00000001": {"serial": "x"}}}', "\0\0"])
def test_the_list_is_made_anew_where_it_is_wrong(tmp_path, content):
    for step in (4, 6, 5):  # after 6, resumed from 4
        save(tmp_path, step)
    (tmp_path / "checkpoints.json").write_text(content)
    assert names(tmp_path) == ["step-00000005", "step-00000006", "step-00000004"]
    save(tmp_path, 7)
    listed = json.loads((tmp_path / "checkpoints.json").read_text())["checkpoints"]
    assert sorted(listed, key=lambda name: listed[name]["serial"], reverse=True) == names(tmp_path)


def test_a_list_of_another_run_does_not_decide(tmp_path):
    for root, steps in (("a", (1, 2)), ("b", (2, 1))):
        for step in steps:
            save(tmp_path / root, step)
    shutil.copy(tmp_path / "b/checkpoints.json", tmp_path / "a/checkpoints.json")
    for name in ("step-00000001", "step-00000002"):  # so that the manifests differ, as those of other weights do
        assert (tmp_path / "a" / name / "trainer/manifest.json").read_bytes() != (
            tmp_path / "b" / name / "trainer/manifest.json"
        ).read_bytes()
    assert names(tmp_path / "a") == ["step-00000002", "step-00000001"]


def refuse(code: int):
    def refused(*_, **__):
        raise OSError(code, os.strerror(code))

    return refused


FAULTS = {
    "links": (os, "symlink", errno.EPERM),
    "fsync of directories": (os, "fsync", errno.EINVAL),
    "deletion": (shutil, "rmtree", errno.ENOTEMPTY),
    "busy deletion": (shutil, "rmtree", errno.EBUSY),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_file_system_refuses_is_reported_once_and_ends_nothing(tmp_path, monkeypatch, caplog, fault):
    owner, name, code = FAULTS[fault]
    real = getattr(owner, name)
    if name == "fsync":
        refused = refuse(code)
        monkeypatch.setattr(owner, name, lambda fd: refused() if os.path.isdir(f"/proc/self/fd/{fd}") else real(fd))
    else:
        monkeypatch.setattr(owner, name, refuse(code))
    caplog.set_level(logging.WARNING)
    state = FakeState(random_tensors(CONFIG))
    check_space(tmp_path, state)
    before = [record.getMessage() for record in caplog.records]
    assert len(before) == 1, "it is tried and reported before training"
    assert os.strerror(code) in before[0]
    for step in (1, 2, 3, 3, 4):
        path = save(tmp_path, step, keep_last=1)
        load_checkpoint(path, state)
        assert names(tmp_path)[0] == path.name
    assert len(caplog.records) == 1
    assert find_resumable(tmp_path, report=pytest.fail) == path


def test_a_copy_of_a_run_that_has_followed_its_links_gets_links_again(tmp_path):
    save(tmp_path / "run", 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert not (tmp_path / "copy/latest").is_symlink()
    path = save(tmp_path / "copy", 2)
    assert (tmp_path / "copy/latest").resolve() == path
    assert (tmp_path / "copy/latest.copy/config.json").is_file(), "what was there is kept"


def test_what_a_save_cannot_do_without_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.os, "rename", refuse(errno.EPERM))
    with pytest.raises(UserError, match=r"cannot be written.*Operation not permitted"):
        check_space(tmp_path, FakeState(random_tensors(CONFIG)))


def test_the_average_is_copied_where_there_are_no_links_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "symlink", refuse(errno.EPERM))
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    (tmp_path / "file").write_text("x")
    folder.link_or_copy(tmp_path / "file", tmp_path / "other")
    assert (tmp_path / "other").read_text() == "x"

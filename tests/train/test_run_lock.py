"""Two starts of one run never train in its directory together."""

import json
import os
import socket
import subprocess
import sys

import pytest
from support import runs

from moe_llm.checkpoint.ranks import Alone
from moe_llm.cli import main
from moe_llm.errors import UserError
from moe_llm.train import run_lock
from moe_llm.train.run import on_main_locked
from moe_llm.train.run_lock import RunLock


def test_a_second_start_is_refused_by_the_first_ones_host_and_process(make_config, tmp_path, capsys):
    config, run_dir = make_config("run", train={"max_steps": 100_000}), tmp_path / "run"
    with runs.started(runs.single(config)) as process:
        runs.wait_for(lambda: runs.steps_written(run_dir) >= 1, process)
        before = sorted(path.name for path in run_dir.iterdir())
        assert main(["train", str(config)]) == 2
        assert f"in use by process {process.pid} on {socket.gethostname()}" in capsys.readouterr().err
        assert sorted(path.name for path in run_dir.iterdir()) == before
        process.kill()
        process.wait()
    lock = RunLock(run_dir)
    lock.acquire()  # a dead owner's lock is taken over
    lock.release()


def test_the_lock_is_free_again_after_a_run(train):
    run_dir = train("run", train={"max_steps": 1})
    assert not list(run_dir.glob(".lock*"))
    lock = RunLock(run_dir)
    lock.acquire()
    lock.release()


def test_a_lock_whose_owner_file_is_unreadable_still_refuses(tmp_path):
    code = f"""
import sys
from pathlib import Path
from moe_llm.train import run_lock
from moe_llm.train.run import on_main_locked
from moe_llm.train.run_lock import RunLock
lock = RunLock(Path({str(tmp_path)!r}))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    ) as owner:
        assert owner.stdout.readline() == "held\n"
        assert json.loads((tmp_path / ".lock-owner.json").read_text())["pid"] == owner.pid
        (tmp_path / ".lock-owner.json").write_text("{")
        with pytest.raises(UserError, match="in use by another process"):
            RunLock(tmp_path).acquire()
        owner.stdin.close()


def test_two_runs_that_save_into_one_directory_by_links_do_not_train_together(tmp_path):
    (tmp_path / "shared").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoints").symlink_to(tmp_path / "shared")
    first, second = RunLock(tmp_path / "a"), RunLock(tmp_path / "b")
    first.acquire()
    with pytest.raises(UserError, match=rf"b' saves into {tmp_path}/shared, which is in use by process {os.getpid()}"):
        second.acquire()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["checkpoints"]
    first.release()
    assert not list(tmp_path.rglob(".lock*"))
    second.acquire()
    second.release()


def test_a_run_directory_of_each_machine_is_refused_before_training(tmp_path):

    class TwoMachines(Alone):
        is_main = True

        def gather(self, value):
            return [value, False if isinstance(value, bool) else value]

    with (
        pytest.raises(UserError, match=r"rank 1 does not see what rank 0 writes to run\.dir="),
        on_main_locked(TwoMachines(), tmp_path / "run"),
    ):
        pytest.fail("too late")
    assert not (tmp_path / "run").exists(), "a run that was refused leaves nothing"
    with on_main_locked(TwoMachinesThatShare(), tmp_path / "run"):
        assert (tmp_path / "run/.lock").exists()


class TwoMachinesThatShare(Alone):
    is_main = True

    def gather(self, value):
        return [value, value]


def test_a_directory_may_be_seen_late_but_not_as_another(tmp_path, monkeypatch):
    lock = RunLock(tmp_path)
    lock.acquire()
    written = run_lock.written_by_owner(tmp_path)
    assert run_lock.is_seen(tmp_path, written)
    stale = iter([None, '{"host": "elsewhere", "pid": 1}', written])
    monkeypatch.setattr(run_lock, "written_by_owner", lambda _: next(stale))
    assert run_lock.is_seen(tmp_path, written)
    monkeypatch.setattr(run_lock, "written_by_owner", lambda _: None)
    monkeypatch.setattr(run_lock, "_SHARED_SECONDS", 0)
    assert not run_lock.is_seen(tmp_path, written)
    lock.release()

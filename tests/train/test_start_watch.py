"""A start that hangs is reported and ended; a start that only takes long is not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from moe_llm import locks
from moe_llm.train import start_watch
from moe_llm.train.start_watch import StartWatch, watchdog_takes_over

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ended(monkeypatch):
    codes: list[int] = []
    monkeypatch.setattr(start_watch.os, "_exit", codes.append)
    monkeypatch.setattr(start_watch, "SAY_EVERY_SECONDS", 0.2)
    return codes


def test_a_quick_phase_that_lasts_is_reported_and_ended(ended, capfd):
    with StartWatch(0.5):
        locks.tell("joining the process group", quick=True)
        time.sleep(1.2)
    err = capfd.readouterr().err
    assert "rank 0: still starting, for 0 s in: joining the process group" in err
    assert "has not started, for" in err
    assert "test_a_quick_phase" in err, "the stacks say where"
    assert ended[0] == start_watch.EXIT_HUNG


def test_a_long_phase_is_reported_and_goes_on(ended, capfd):
    with StartWatch(0.2):
        locks.tell("tokenising")
        time.sleep(0.8)
    err = capfd.readouterr().err
    assert "still starting" in err
    assert "in: tokenising" in err
    assert ended == []


def test_progress_keeps_it_silent(ended, capfd):
    with StartWatch(0.3):
        for i in range(10):
            locks.tell(f"part {i}", quick=True)
            time.sleep(0.08)
    assert capfd.readouterr().err == ""
    assert ended == []


def test_the_watchdog_takes_over_and_nothing_listens_afterwards(ended):
    with StartWatch(0.2):
        locks.tell("joining", quick=True)
        watchdog_takes_over()
        time.sleep(0.6)
        assert locks.listeners == []
    assert ended == []


def test_it_watches_from_the_first_check_on(ended, capfd, monkeypatch, make_config):
    """Looking for the data may hang too, on a file system that does not answer."""
    from moe_llm.config import load_config
    from moe_llm.errors import UserError
    from moe_llm.train import run

    def slow(config):
        time.sleep(0.8)
        raise UserError("no data")

    monkeypatch.setattr(run, "check_sources", slow)
    with pytest.raises(UserError, match="no data"):
        run.train(load_config(make_config("watched")))
    assert "still starting, for 0 s in: reading the configuration" in capfd.readouterr().err
    assert locks.listeners == []


def test_a_rank_without_the_others_ends_and_says_what_it_waited_for(tmp_path):
    raw = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    raw |= {"run": {"dir": str(tmp_path / "run")}}
    raw["train"] |= {"hang_timeout_seconds": 12, "device": "cpu"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    launcher = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29871",
    }
    done = subprocess.run(
        [sys.executable, "-m", "moe_llm.train", str(tmp_path / "config.yaml")],
        env={**os.environ, **launcher, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == start_watch.EXIT_HUNG
    assert "in: joining the process group of 2 ranks at 127.0.0.1:29871" in done.stderr
    assert "see that all ranks were launched" in done.stderr

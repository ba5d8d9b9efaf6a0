"""Ranks that hang, stop or die: the others end, with a message that names the one that it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from moe_llm.train.callbacks import watchdog
from moe_llm.train.callbacks.watchdog import Watchdog

ROOT = Path(__file__).parents[2]
ALONE = SimpleNamespace(rank=0, world_size=1, is_main=True)


@pytest.fixture
def ended(monkeypatch):
    """The exit codes with which the process would have ended."""
    codes: list[int] = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    return codes


def wait_until(condition, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_no_progress_ends_the_process_and_names_the_phase(ended, capfd):
    with Watchdog(ALONE, 0.4) as guard:
        guard.heartbeat("step 7, optimizer")
        assert wait_until(lambda: ended)
    err = capfd.readouterr().err
    assert set(ended) == {watchdog.EXIT_HUNG} != {0}
    assert "rank 0 has made no progress for" in err
    assert "in: step 7, optimizer" in err
    assert "test_no_progress_ends_the_process" in err  # the stack says where


def test_progress_and_the_end_of_training_keep_it_quiet(ended):
    with Watchdog(ALONE, 0.6) as guard:
        for i in range(12):
            guard.heartbeat(f"step {i}")
            time.sleep(0.1)
    time.sleep(1)
    with Watchdog(ALONE, None):
        time.sleep(0.5)
    assert ended == []


def test_time_in_which_the_process_itself_was_stopped_does_not_count(ended, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + shift[0])
    shift = [0.0]
    monkeypatch.setattr(watchdog, "time", clock)
    with Watchdog(ALONE, 5.0) as guard:
        guard.heartbeat("step 1")
        time.sleep(0.3)
        shift[0] = 1000.0  # as after Ctrl-Z and fg
        time.sleep(2.5)
    assert ended == []


def two_ranks(name: str, tmp_path, *launcher: str, **sections):
    """A run of 2 ranks that share the experts, under accelerate's launcher; and its directory."""
    text = tmp_path / "text"
    text.mkdir(exist_ok=True)
    for i in range(20):
        (text / f"{i}.txt").write_text("".join(f"def f{i}{j}(x): return x + {j}\n" for j in range(20)))
    raw = {
        "run": {"dir": str(tmp_path / name)},
        "model": {
            "vocab_size": 300,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 64,
        },
        "data": {
            "sources": [{"type": "files", "path": str(text / "*.txt")}],
            "sequence_length": 32,
            "validation_fraction": 0.2,
            "cache_dir": str(tmp_path / "cache"),
        },
        "optim": {"schedule": "constant"},
        "train": {
            "max_steps": 100_000,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "precision": "fp32",
            "device": "cpu",
            **sections.pop("train", {}),
        },
        "parallel": {"expert_parallel_size": 2},
        "evaluate": {"max_blocks": 2},
        "logging": {"console": "off"},
        **sections,
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "configs/accelerate/cpu_2.yaml"),
        *launcher,
        str(ROOT / "scripts/train.py"),
        str(path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}
    log = (tmp_path / f"{name}.log").open("w")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True)
    return process, tmp_path / name, tmp_path / f"{name}.log"


def steps(run_dir) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def rank_processes(launcher: subprocess.Popen) -> dict[int, int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [item[5:] for item in environment if item.startswith(b"RANK=")]
        found |= {int(rank): int(child) for rank in ranks}
    return found


def exists(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def ended_and_restarted(tmp_path, number: int) -> str:
    """Signal rank 1 of a run that may be restarted once; the run's output, when it has come to its end."""
    process, run_dir, log = two_ranks(
        "run",
        tmp_path,
        "--max_restarts",
        "1",
        checkpoint={"every_steps": 5, "keep_last": 2},
        train={"max_steps": 60, "hang_timeout_seconds": 8},
    )
    try:
        assert wait_until(lambda: steps(run_dir) >= 12 or process.poll() is not None, 200), log.read_text()
        first = rank_processes(process)
        assert sorted(first) == [0, 1]
        os.kill(first[1], number)
        assert wait_until(lambda: not any(map(exists, first.values())), 60)
        assert process.wait(200) == 0, log.read_text()
    finally:
        process.kill()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert (run_dir / "checkpoints/latest").resolve().name == "step-00000060"
    return log.read_text()


@pytest.mark.grid
def test_a_stopped_rank_is_named_and_ended_and_a_restart_goes_on_by_itself(tmp_path):
    told = ended_and_restarted(tmp_path, signal.SIGSTOP)
    assert "rank 0 has made no progress for" in told
    assert "rank 1 has died, was stopped or is out of reach: silent for " in told
    assert "in train_loop" in told  # the stack says where rank 0 waits


@pytest.mark.grid
def test_a_killed_rank_ends_the_other_and_a_restart_goes_on_by_itself(tmp_path):
    assert "(exitcode: -9) local_rank: 1" in ended_and_restarted(tmp_path, signal.SIGKILL)

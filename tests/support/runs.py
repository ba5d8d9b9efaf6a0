"""Whole runs on a few kilobytes of text: in this process, or as real ones that can be killed."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
MODEL = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "router_z_loss_coef": 0.001,
    "initializer_range": 0.1,
}


def write_text(path: Path, lines: int = 160) -> Path:
    """A document a line, of invented words: the same text each time."""
    draw = random.Random(1)
    words = ["".join(draw.choice("abcdefghijklmnop") for _ in range(draw.randint(2, 6))) for _ in range(200)]
    text = "".join(" ".join(draw.choice(words) for _ in range(draw.randint(4, 40))) + "\n" for _ in range(lines))
    path.write_text(text, encoding="utf-8")
    return path


def sections(text: Path, cache: Path, run_dir: Path, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A configuration as a nested dictionary; the sections in `changes` are merged in."""
    raw: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run_dir), "seed": 5},
        "model": MODEL,
        "data": {
            "sources": [{"type": "files", "path": str(text), "document": "line"}],
            "sequence_length": 32,
            "validation_fraction": 0.1,
            "cache_dir": str(cache),
            "num_workers": 1,
        },
        "optim": {"lr": 3e-3},
        "train": {"max_steps": 6, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32", "device": "cpu"},
        "checkpoint": {"every_steps": 3},
        "evaluate": {"max_blocks": 4},
        "logging": {"console": "plain", "plots": False},  # a picture costs more than such a run
    }
    for name, values in changes.items():
        raw[name] = {**raw.get(name, {}), **values}
    return raw


def trained(text: Path, root: Path, steps: int) -> Path:
    """The checkpoint of so many steps of `sections`, trained by the command line in this process."""
    from moe_llm.cli import main

    raw = sections(text, root / "cache", root / "run", train={"max_steps": steps}, logging={"console": "off"})
    assert main(["train", str(write_yaml(root / "base.yaml", raw))]) == 0
    return root / "run/checkpoints/latest"


def write_yaml(path: Path, raw: dict) -> Path:
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; not one of them may be broken."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    """The records without what a clock gave: everything in them is a function of the configuration."""
    return [{key: value for key, value in r.items() if key != "tokens_per_second"} for r in records(run_dir)]


def fingerprint(directory: Path) -> dict[str, str]:
    """Every file and link under a directory, by relative path, with hashes of files and targets of links."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def copy_run(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, symlinks=True))


def environment() -> dict[str, str]:
    """With as many threads as this process has: sums are then taken in the same order."""
    import torch

    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(torch.get_num_threads())}


def single(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts/train.py"), str(config), *overrides]


def launched(config: Path, *overrides: str) -> list[str]:
    """As a user starts two ranks."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    return [*accelerate, "--config_file", str(ROOT / "configs/accelerate/cpu_2.yaml"), *single(config, *overrides)[1:]]


def finish(command: list[str], timeout: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=timeout, check=False
    )


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen]:
    """A process in a session of its own, of which nothing is left when the block ends."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid] if process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    found = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, tasks.read_text().split()):
            found += [child, *descendants(child)]
    return found


def rank_processes(pid: int) -> dict[int, int]:
    """rank -> process id, of the ranks below a launcher."""
    found = {}
    for child in descendants(pid):
        entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((e[5:] for e in entries if e.startswith(b"RANK=")), None)
        # helpers of a rank have its environment too; the rank itself is the first
        if rank is not None:
            found.setdefault(int(rank), child)
    return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended too early with {process.returncode}: {process.communicate()[1]}")
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.005)


def steps_written(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0

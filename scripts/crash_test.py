"""Kill a run at random moments and show that nothing is lost: python scripts/crash_test.py [--kills 100] [--seed 0]

A tiny model is trained on 2 ranks with expert parallelism and saves every few steps. All its processes are killed
(kill -9) at random moments, drawn from a seed, and the same command is given again, until the run ends. Then
metrics.jsonl must have every step exactly once, with the losses of a run that nobody interrupted; and at each kill
the newest complete checkpoint must be one that the next start resumes from. Once with checkpoints written
synchronously and once in the background. Prints a table; the exit code is 1 if anything failed.

With `--refuse` the file system refuses something at each start, in turn: symbolic links (EPERM, as exFAT), fsync of
directories (EINVAL, as older CIFS), removal of directories (ENOTEMPTY, as NFS) and of files (EBUSY). The errors are
planted in the processes of the run, for everything below its checkpoints.

The ranks of each start are forked from this process, which has imported all that the uninterrupted run needed: a start
then takes two seconds in place of some twenty.
"""

import argparse
import contextlib
import errno
import importlib
import json
import os
import random
import re
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
STEPS_A_KILL = 8  # a run advances by at most so many steps before it is killed
SAVE_EVERY = 3
TOLERANCE = 1e-5
EXACT = ("step", "tokens", "lr")
COMPARED = ("loss", "lm_loss", "aux_loss", "z_loss", "grad_norm", "val_loss")
WRITING, PUBLISHING = "writing a checkpoint", "publishing a checkpoint"
PHASES = ("starting", "training", WRITING, PUBLISHING)
ENOUGH = 20  # kills, for each phase to have met one
# what the file system may refuse, by the function of `os`
FAULTS = {"symlink": errno.EPERM, "fsync": errno.EINVAL, "rmdir": errno.ENOTEMPTY, "unlink": errno.EBUSY}
Fault = tuple[str, int]
RANKS = 2
MODULES = "modules.json"


@dataclass
class Outcome:
    """What became of the killed run of one mode."""

    phases: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    worst: float = 0.0
    records: int = 0
    seconds: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--kills", type=int, default=100, help="of each mode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", nargs="+", choices=("sync", "async"), default=("sync", "async"))
    parser.add_argument("--refuse", action="store_true", help="plant errors of file systems")
    options = parser.parse_args()
    steps = STEPS_A_KILL * options.kills + 2 * SAVE_EVERY
    with tempfile.TemporaryDirectory(prefix="crash_test_") as directory:
        work = Path(directory)
        os.environ["OMP_NUM_THREADS"] = "1"  # the same sums in the same order each time
        sys.path.insert(0, str(ROOT))
        import_all(["deepspeed", "moe_llm.train.run"])
        print(f"seed {options.seed}, {options.kills} kills a mode, {steps} steps, saved every {SAVE_EVERY}", flush=True)
        expected = uninterrupted(work, steps)
        outcomes = {mode: killed(work, mode, steps, options, expected) for mode in options.modes}
    print_table(outcomes, options.kills)
    return int(any(outcome.problems for outcome in outcomes.values()))


def uninterrupted(work: Path, steps: int) -> list[dict]:
    """The records of the run that everything is compared with."""
    (work / "text.txt").write_text(invented_text(), encoding="utf-8")
    log, ended = start_and_kill(write_config(work, "reference", steps, "sync"), work / "reference.log")
    if ended:
        sys.exit(f"the uninterrupted run failed:\n{log}")
    import_all(json.loads((work / MODULES).read_text()))
    return read_records(work / "reference")


def killed(work: Path, mode: str, steps: int, options: argparse.Namespace, expected: list[dict]) -> Outcome:
    """Kill a run so many times, let it end, and compare it with the uninterrupted one."""
    kills, refusals = options.kills, list(FAULTS.items()) if options.refuse else []
    draw, outcome, start = random.Random(f"{options.seed}/{mode}"), Outcome(), time.monotonic()
    run_dir = work / mode
    config = write_config(work, mode, steps, mode)
    for number in range(1, kills + 1):
        before, log_file = newest(run_dir), work / f"{mode}.log"
        moment, when = draw_moment(draw, number, run_dir, log_file)
        started = time.time()
        fault = refusals[number % len(refusals)] if refusals else None
        log, ended = start_and_kill(config, log_file, when, fault)
        outcome.problems += [f"kill {number}: {problem}" for problem in check_start(log, ended, before)]
        phase = phase_of(run_dir, log, started)
        outcome.phases[phase] += 1
        print(
            f"{mode} {number}/{kills}: wanted {moment}, killed while {phase}, {len(read_lines(run_dir))} steps "
            f"recorded, newest checkpoint {newest(run_dir)}",
            flush=True,
        )
    before = newest(run_dir)
    log, ended = start_and_kill(config, work / f"{mode}.log")
    outcome.problems += [f"last start: {problem}" for problem in check_start(log, ended, before, to_the_end=True)]
    compare(outcome, run_dir, expected)
    if kills >= ENOUGH:
        missed = [phase for phase in PHASES if not outcome.phases[phase]]
        outcome.problems += [f"no kill came while {phase}: take another seed" for phase in missed]
    outcome.seconds = time.monotonic() - start
    return outcome


def draw_moment(draw: random.Random, number: int, run_dir: Path, log: Path) -> tuple[str, Callable[[float], bool]]:
    """What to wait for, in words and as a condition on the seconds since the start.

    Of five kills one comes at any time of the start. The others come some steps after it: a moment after a step,
    at once or a moment after a directory for a new checkpoint has appeared, and while one is being published.
    """
    drawn = time.time()
    goal = resumed_step(run_dir) + draw.randint(1, STEPS_A_KILL - SAVE_EVERY - 1)
    if number % 5 == 1:
        seconds = draw.uniform(0.1, 6)
        return f"{seconds:.1f} s after the start", lambda now: now > seconds or last_step(log.read_text()) >= goal
    phases, what, later = [
        ((WRITING, PUBLISHING), f"step {goal} a save begins", draw.uniform(0, 0.08)),
        (),  # above
        ((WRITING, PUBLISHING), f"step {goal} a save begins", 0.0),
        (PHASES, f"step {goal}", draw.uniform(0, 0.1)),
        ((PUBLISHING,), f"step {goal} a save is published", draw.uniform(0, 0.005)),
    ][number % 5]
    since: list[float] = []

    def when(elapsed: float) -> bool:
        if not since and last_step(log.read_text()) >= goal and disk_phase(run_dir, drawn) in phases:
            since.append(elapsed)
        return bool(since) and elapsed - since[0] >= later

    return f"{what}, and {1000 * later:.0f} ms", when


def start_and_kill(
    config: Path, log: Path, when: Callable[[float], bool] = lambda seconds: False, fault: Fault | None = None
) -> tuple[str, int | None]:
    """Start a run; kill all its processes once `when(seconds)`. What it printed, and its exit code if it ended."""
    log.write_text("")
    port, codes = free_port(), dict[int, int | None]()
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            be_rank(rank, port, config, log, fault)
        codes[pid] = None
    start = time.monotonic()
    try:
        while None in codes.values() and not any(codes.values()) and not when(time.monotonic() - start):
            time.sleep(0.001)
            for pid in [pid for pid, code in codes.items() if code is None]:
                done, status = os.waitpid(pid, os.WNOHANG)
                codes[pid] = os.waitstatus_to_exitcode(status) if done else None
    finally:
        kill_all([pid for pid, code in codes.items() if code is None])
    ended = next(filter(None, codes.values()), None if None in codes.values() else 0)
    return log.read_text(encoding="utf-8", errors="replace"), ended


def kill_all(ranks: list[int]) -> None:
    """The ranks, and whatever they have started, at once."""
    for pid in [found for rank in ranks for found in (rank, *descendants(rank))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for rank in ranks:
        os.waitpid(rank, 0)


def be_rank(rank: int, port: int, config: Path, log: Path, fault: Fault | None) -> NoReturn:
    """What a launcher gives a rank, and then what it runs."""
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in given.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
        if fault is not None:
            plant(*fault)
        from moe_llm.cli import main as run

        code = run(["train", str(config)])
        if rank == 0:
            (config.parent / MODULES).write_text(json.dumps([*sys.modules]))
    except BaseException:  # noqa: BLE001 (it belongs in the log, and must not return into the test)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def plant(name: str, code: int) -> None:
    """Let a function of `os` fail for whatever is below a run's checkpoints; fsync for directories alone."""
    real = getattr(os, name)

    def refused(*args: Any, dir_fd: int | None = None, **options: Any) -> Any:
        if name == "fsync":
            refuses = stat.S_ISDIR(os.fstat(args[0]).st_mode)
        else:
            base = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            place = Path(base, args[1] if name == "symlink" else args[0]).parts
            # files at the top are the list and the links, which are replaced and not removed
            refuses = "checkpoints" in place[: -2 if name == "unlink" else -1]
        if refuses:
            raise OSError(code, os.strerror(code), str(args))
        return real(*args, **options) if dir_fd is None else real(*args, dir_fd=dir_fd, **options)

    setattr(os, name, refused)


def import_all(names: list[str]) -> None:
    """Modules that ranks need: forked ranks have them then."""
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    found = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, tasks.read_text().split()):
                found += [child, *descendants(child)]
    return found


def check_start(log: str, ended: int | None, before: str | None, to_the_end: bool = False) -> list[str]:
    """What is wrong with how a run came up, and with how it went until it was killed."""
    problems = []
    if ended is not None and (ended or not to_the_end):
        problems.append(f"it ended by itself with exit code {ended}: {log[-600:]}")
    if "passed over" in log:
        problems.append(f"a complete checkpoint was unsound: {log[-600:]}")
    resumed = re.search(r"resuming from .*/(step-\d+)", log)
    trained = re.search(r"training tokens", log)  # announced just before
    if before and trained and (resumed is None or resumed[1] != before):
        problems.append(f"it resumed from {resumed and resumed[1]} and not from {before}")
    return problems


def phase_of(run_dir: Path, log: str, started: float) -> str:
    """What the run was doing, by what it has left behind."""
    return disk_phase(run_dir, started) if last_step(log) else "starting"


def disk_phase(run_dir: Path, since: float) -> str:
    left = unfinished(run_dir, since)
    if any(not path.name.startswith(".tmp-step-") or (path / "trainer/manifest.json").exists() for path in left):
        return PUBLISHING
    return WRITING if left else "training"


def unfinished(run_dir: Path, since: float) -> list[Path]:
    """What is being written or deleted among the checkpoints, without what an earlier run has left."""
    found = []
    for path in run_dir.glob("checkpoints/.tmp-*"):
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_ctime > since:
                found.append(path)
    return found


def newest(run_dir: Path) -> str | None:
    """The complete checkpoint of the highest step; steps only grow here, since each start resumes from it."""
    return max((path.name for path in run_dir.glob("checkpoints/step-*")), default=None)


def resumed_step(run_dir: Path) -> int:
    return int((newest(run_dir) or "step-0").removeprefix("step-").removesuffix(".old"))


def read_lines(run_dir: Path) -> list[str]:
    path = run_dir / "metrics.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def last_step(log: str) -> int:
    """The last step that a run has told of, in plain lines; 0 before the first."""
    return max(map(int, re.findall(r"^step +(\d+)/", log, re.MULTILINE)), default=0)


def read_records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in read_lines(run_dir)]


def compare(outcome: Outcome, run_dir: Path, expected: list[dict]) -> None:
    """Every record of the killed run with that of the uninterrupted one."""
    found = read_records(run_dir)
    outcome.records = len(found)
    if [r["step"] for r in found] != [r["step"] for r in expected]:
        outcome.problems.append(f"the steps recorded are {[r['step'] for r in found]}")
        return
    for ours, theirs in zip(found, expected, strict=True):
        if ours.keys() != theirs.keys() or any(ours[key] != theirs[key] for key in EXACT):
            outcome.problems.append(f"step {theirs['step']} has other keys, tokens or learning rate")
        for key in COMPARED:
            if key in theirs and key in ours:
                outcome.worst = max(outcome.worst, abs(ours[key] - theirs[key]) / max(abs(theirs[key]), 1e-12))
    if not outcome.worst <= TOLERANCE:
        outcome.problems.append(f"the largest relative difference is {outcome.worst:.2e}")


def print_table(outcomes: dict[str, Outcome], kills: int) -> None:
    head = ["mode", "kills", *PHASES, "steps", "largest difference", "minutes", "result"]
    rows = [
        [
            mode,
            str(kills),
            *(str(o.phases[phase]) for phase in PHASES),
            str(o.records),
            f"{o.worst:.1e}",
            f"{o.seconds / 60:.1f}",
            "FAIL" if o.problems else "PASS",
        ]
        for mode, o in outcomes.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for mode, outcome in outcomes.items():
        for problem in outcome.problems:
            print(f"{mode}: {problem}")


def write_config(work: Path, name: str, steps: int, mode: str) -> Path:
    """The run's configuration: the same each time."""
    model = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32,
        "router_z_loss_coef": 0.001,
    }
    config = {
        "run": {"dir": str(work / name), "seed": 3},
        "model": model,
        "data": {
            "sources": [{"type": "files", "path": str(work / "text.txt"), "document": "line"}],
            "sequence_length": 32,
            "validation_fraction": 0.1,
            "num_workers": 1,
            "cache_dir": str(work / "cache"),
        },
        "train": {"max_steps": steps, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32"},
        "parallel": {"expert_parallel_size": 2},
        # many small files: more moments between which a save may be cut
        "checkpoint": {"every_steps": SAVE_EVERY, "keep_last": 2, "max_shard_size": "40KB", "async": mode == "async"},
        "evaluate": {"every_steps": 10, "max_blocks": 4},
        "logging": {"console": "plain"},
    }
    path = work / f"{name}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def invented_text() -> str:
    """A document a line, of invented words: the same text each time."""
    draw = random.Random(1)
    words = ["".join(draw.choice("abcdefghijklmnop") for _ in range(draw.randint(2, 6))) for _ in range(200)]
    return "".join(" ".join(draw.choice(words) for _ in range(draw.randint(4, 40))) + "\n" for _ in range(400))


if __name__ == "__main__":
    sys.exit(main())

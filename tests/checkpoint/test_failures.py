"""Saves that fail or die: what was complete stays, the next save cleans up, all ranks learn of it."""

import builtins
import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    FakeState,
    ThreadRanks,
    random_tensors,
    save_arguments,
    small_config,
)
from support.ci import dear

from moe_llm.checkpoint import safetensors_io
from moe_llm.checkpoint.resume import find_resumable
from moe_llm.checkpoint.state import save_checkpoint
from moe_llm.errors import UserError

CONFIG = small_config(num_hidden_layers=1)


def silent(sentence):
    raise AssertionError(f"reported: {sentence}")


def save_on_ranks(root, world, **changes):
    ranks, tensors = ThreadRanks(world), random_tensors(CONFIG)
    return ranks.run(
        lambda rank: save_checkpoint(root, FakeState(tensors, world, rank, ranks), **save_arguments(CONFIG, **changes))
    )


class FailingWriter(safetensors_io.ShardWriter):
    """Runs out of space after some tensors, in files of one name."""

    only, left, code = "", 0, errno.ENOSPC

    def write(self, name, tensor):
        if self.only in self.path.name:
            if not FailingWriter.left:
                raise OSError(self.code, os.strerror(self.code))
            FailingWriter.left -= 1
        super().write(name, tensor)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("only", "left"), [("model", 0), ("model", 3), ("optimizer", 5)])
def test_a_full_disk_is_told_to_all_ranks_and_harms_nothing(tmp_path, monkeypatch, world, only, left):
    before = save_on_ranks(tmp_path, world, step=1)[0][0]
    monkeypatch.setattr(FailingWriter, "only", only)
    monkeypatch.setattr(FailingWriter, "left", left)
    monkeypatch.setattr("moe_llm.checkpoint.plan.ShardWriter", FailingWriter)
    outcomes = save_on_ranks(tmp_path, world, step=2, keep_last=1)
    assert all(isinstance(error, UserError) for _, error in outcomes)
    sentence = str(outcomes[0][1])
    assert "no space left" in sentence
    assert "step-00000002" in sentence
    assert "GB are free" in sentence
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints.json", "latest", "step-00000001"]
    assert find_resumable(tmp_path, report=silent) == before


def test_one_failing_rank_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(FailingWriter, "only", "model-00002-of-00002")
    monkeypatch.setattr(FailingWriter, "left", 2)
    monkeypatch.setattr(FailingWriter, "code", errno.EIO)
    monkeypatch.setattr("moe_llm.checkpoint.plan.ShardWriter", FailingWriter)
    outcomes = save_on_ranks(tmp_path, 2)
    assert len({str(error) for _, error in outcomes}) == 1
    assert all(isinstance(e, UserError) and "Input/output error" in str(e) for _, e in outcomes)
    assert not list(tmp_path.iterdir())


def test_a_bug_on_one_rank_reaches_the_others(tmp_path, monkeypatch):
    """And is not dressed up as the user's."""

    def broken(self, name, tensor):
        if "model-00002" in self.path.name:
            raise ZeroDivisionError("ours")
        true_write(self, name, tensor)

    true_write = safetensors_io.ShardWriter.write
    monkeypatch.setattr(safetensors_io.ShardWriter, "write", broken)
    (_, first), (_, second) = save_on_ranks(tmp_path, 2)
    assert isinstance(second, ZeroDivisionError)
    assert isinstance(first, RuntimeError)
    assert "rank 1: ZeroDivisionError: ours" in str(first)


def test_too_little_space_is_found_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    opened = []
    monkeypatch.setattr(safetensors_io.ShardWriter, "__init__", lambda *a: opened.append(a))
    outcomes = save_on_ranks(tmp_path, 2)
    needed = "needs 0.0168 GB and 1e-06 GB are free"
    assert all(isinstance(e, UserError) and needed in str(e) for _, e in outcomes)
    assert not opened
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["trainer/state.json", "config.json", "trainer/manifest.json"])
def test_small_files_fail_as_gracefully(tmp_path, monkeypatch, target):
    true_open = builtins.open

    def failing(path, mode="r", *rest, **options):
        if "w" in mode and str(path).endswith(target):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))
        return true_open(path, mode, *rest, **options)

    monkeypatch.setattr(builtins, "open", failing)
    outcomes = save_on_ranks(tmp_path, 2)
    assert all(isinstance(e, UserError) and "no space left" in str(e) for _, e in outcomes)
    assert not list(tmp_path.iterdir())


def test_a_root_that_is_a_file(tmp_path):
    root = tmp_path / "checkpoints"
    root.write_text("")
    with pytest.raises(UserError, match="checkpoints"):
        save_checkpoint(root, FakeState(random_tensors(CONFIG)), **save_arguments(CONFIG))


def test_what_json_cannot_hold_is_refused_before_writing(tmp_path):
    arguments = save_arguments(CONFIG, trainer_state={"rng": torch.zeros(1)})
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(tmp_path, FakeState(random_tensors(CONFIG)), **arguments)
    assert not list(tmp_path.iterdir())


# A child process dies, as by kill -9, before the n-th operation that touches the disk, for each n.
# It is forked from one that has everything imported.
_DIE = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
from support.checkpoints import FakeState, random_tensors, save_arguments, small_config, zeros_like
from moe_llm.checkpoint import safetensors_io
from moe_llm.checkpoint.background import Background
from moe_llm.checkpoint.ranks import ALONE
from moe_llm.checkpoint.state import save_checkpoint
import builtins

root, again = Path(sys.argv[1]), int(sys.argv[2])
config = small_config(num_hidden_layers=1, num_local_experts=2)

def dying(module, name):
    true = getattr(module, name)
    def wrapped(*args, **options):
        global left
        if left == 0:
            os._exit(9)
        left -= 1
        return true(*args, **options)
    setattr(module, name, wrapped)

def save(step, seed, keep_last):
    background = Background(ALONE, print) if sys.argv[4] == "background" else None
    save_checkpoint(root, FakeState(random_tensors(config, seed)), background=background,
                    **save_arguments(config, step=step, keep_last=keep_last, max_shard_size="8KB"))
    if background is not None:
        background.wait()

left = -1
save(1, 1, None)
save(2, 2, None)
for name in ("fsync", "rename", "replace", "symlink", "unlink", "rmdir", "mkdir"):
    dying(os, name)
dying(builtins, "open")
dying(safetensors_io.ShardWriter, "write")
point, stride = 0, int(sys.argv[5])
while True:
    child = os.fork()
    if child == 0:
        left = point
        save(again, 3, 1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(point, status, flush=True)
    if status != 9:
        sys.exit(status)
    check = os.fork()
    if check == 0:
        left = -1
        import subprocess
        from moe_llm.checkpoint.resume import find_resumable
        from moe_llm.checkpoint.state import load_checkpoint
        def never(sentence): raise AssertionError(sentence)
        found = find_resumable(root, report=never)
        state = FakeState(zeros_like(random_tensors(config)))
        load_checkpoint(found, state)
        head = "lm_head.weight", "weight"
        seed = next(s for s in (1, 2, 3) if torch.equal(state.held[head], random_tensors(config, s)[head]))
        for key, tensor in random_tensors(config, seed).items():
            assert torch.equal(state.held[key], tensor), key
        print("resumes", seed, (root / "latest").exists(), flush=True)
        os._exit(0 if seed > 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(check, 0)[1]) == 0
    point += stride
"""


@pytest.mark.parametrize(
    ("again", "how", "stride"),
    dear(
        [(again, how, stride) for again in (3, 2) for how in ("at once", "background") for stride in (1, 3)],
        (3, "background", 3),
        (2, "at once", 3),
    ),
)
def test_dying_at_any_moment_of_a_save_loses_nothing_that_was_complete(tmp_path, again, how, stride):
    """The newest complete checkpoint is the previous one or, at the end, the new one; never half a one."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _DIE, str(tmp_path), str(again), str(tests), how, str(stride)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert sum(line.endswith(" 9") for line in lines) > 20 // stride
    seeds = [int(line.split()[1]) for line in lines if line.startswith("resumes")]
    assert seeds == sorted(seeds)
    assert {2, 3} == set(seeds)
    # the last child lived: what the dead ones left is gone, and it kept one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints.json", "latest", f"step-{again:08d}"]
    assert find_resumable(tmp_path, report=silent) == (tmp_path / "latest").resolve()

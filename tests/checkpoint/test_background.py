"""Saves in the background: the same files, of the tensors as they were, and failures that nobody misses."""

import errno
import os
import threading
import time

import pytest
import torch
from support.checkpoints import (
    FakeState,
    ThreadRank,
    ThreadRanks,
    random_tensors,
    save_arguments,
    small_config,
    zeros_like,
)

from moe_llm.checkpoint import safetensors_io
from moe_llm.checkpoint.background import Background
from moe_llm.checkpoint.plan import HostCopy, stream
from moe_llm.checkpoint.ranks import ALONE
from moe_llm.checkpoint.resume import find_resumable
from moe_llm.checkpoint.state import load_checkpoint, save_checkpoint
from moe_llm.errors import UserError

CONFIG = small_config(num_hidden_layers=1)


def unheard(sentence):
    raise AssertionError(f"reported: {sentence}")


class Disk:
    """A disk that stands still until it is let go; `reached`: a write has come to it."""

    def __init__(self, monkeypatch):
        self.reached, self.goes = threading.Event(), threading.Event()
        true_write = safetensors_io.ShardWriter.write

        def write(writer, name, tensor):
            self.reached.set()
            assert self.goes.wait(30), "the disk was never let go"
            true_write(writer, name, tensor)

        monkeypatch.setattr(safetensors_io.ShardWriter, "write", write)


@pytest.fixture
def disk(monkeypatch):
    made = Disk(monkeypatch)
    yield made
    made.goes.set()


class AliasState(FakeState):
    """Reads the very tensors that training changes, as an engine on the CPU does."""

    def read(self, name, kind):
        return self.held[name, kind]


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def on_ranks(world, work):
    """`work(rank, its share of the state's ranks, its Background)` on every rank."""
    ranks, side = ThreadRanks(world), ThreadRanks(world)
    return ranks.run(lambda rank: work(rank, ranks, Background(ThreadRank(side, rank), unheard)))


@pytest.mark.parametrize("shard", ["5GB", "1KB"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2), (4, 2)])
def test_the_same_bytes_as_a_save_that_is_waited_for(tmp_path, world, ep, dtype, shard):
    tensors, options = random_tensors(CONFIG), {"dtype": dtype, "max_shard_size": shard}

    def work(rank, ranks, background):
        state = FakeState(tensors, ep, rank, ranks)
        with background:
            for step in (1, 2, 3):
                arguments = save_arguments(CONFIG, step=step, keep_last=2, **options)
                save_checkpoint(tmp_path / "sync", state, **arguments)
                save_checkpoint(tmp_path / "async", state, **arguments, background=background)

    assert [error for _, error in on_ranks(world, work)] == [None] * world
    files = contents(tmp_path / "sync")
    assert len(files) > 10
    assert contents(tmp_path / "async") == files
    assert (tmp_path / "async/latest").resolve().name == "step-00000003"
    assert sorted(p.name for p in (tmp_path / "async").iterdir()) == [
        "checkpoints.json",
        "latest",
        "step-00000002",
        "step-00000003",
    ]


def test_what_is_written_is_what_was_there_when_it_was_asked_for(tmp_path, disk):
    tensors, trainer = random_tensors(CONFIG), {"samples": 7, "losses": [1.0, 2.0]}
    state, background = AliasState(tensors), Background(ALONE, unheard)
    path = save_checkpoint(tmp_path, state, **save_arguments(CONFIG, trainer_state=trainer), background=background)
    assert disk.reached.wait(30)
    for tensor in state.held.values():
        tensor.add_(1.0)
    trainer["losses"].append(3.0)
    trainer["samples"] = 8
    disk.goes.set()
    background.wait()
    restored = FakeState(zeros_like(tensors))
    assert load_checkpoint(path, restored) == {"samples": 7, "losses": [1.0, 2.0]}
    for key, tensor in tensors.items():
        assert torch.equal(restored.held[key], tensor), key


def test_a_save_comes_back_before_the_disk_does_and_the_next_one_waits(tmp_path, disk):
    state, background = FakeState(random_tensors(CONFIG)), Background(ALONE, unheard)
    first = save_checkpoint(tmp_path, state, **save_arguments(CONFIG, step=1), background=background)
    assert disk.reached.wait(30)
    assert not first.exists()  # it has its name when all is there
    assert find_resumable(tmp_path, report=unheard) is None
    returned = threading.Event()

    def save_again():
        save_checkpoint(tmp_path, state, **save_arguments(CONFIG, step=2), background=background)
        returned.set()

    second = threading.Thread(target=save_again)
    second.start()
    assert not returned.wait(0.3)
    disk.goes.set()
    second.join(30)
    assert returned.is_set()
    assert first.exists()
    background.wait()
    assert find_resumable(tmp_path, report=unheard).name == "step-00000002"


def failing_on(monkeypatch, file, error):
    true_write = safetensors_io.ShardWriter.write

    def write(writer, name, tensor):
        if file in writer.path.name:
            raise error
        true_write(writer, name, tensor)

    monkeypatch.setattr(safetensors_io.ShardWriter, "write", write)


@pytest.mark.parametrize("when", ["at the next save", "at the end"])
def test_a_full_disk_of_one_rank_is_told_to_all(tmp_path, monkeypatch, when):
    tensors = random_tensors(CONFIG)

    def work(rank, ranks, background):
        state = FakeState(tensors, 2, rank, ranks)
        save_checkpoint(tmp_path, state, **save_arguments(CONFIG, step=1))
        ranks.barrier.wait()
        if rank == 0:
            failing_on(monkeypatch, "model-00002", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        ranks.barrier.wait()
        with background:
            save_checkpoint(tmp_path, state, **save_arguments(CONFIG, step=2, keep_last=1), background=background)
            if when == "at the next save":
                save_checkpoint(tmp_path, state, **save_arguments(CONFIG, step=3), background=background)
                raise AssertionError("the failure has been missed")

    outcomes = on_ranks(2, work)
    assert all(isinstance(error, UserError) for _, error in outcomes), outcomes
    assert len({str(error) for _, error in outcomes}) == 1
    assert "no space left" in str(outcomes[0][1])
    assert "step-00000002" in str(outcomes[0][1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints.json", "latest", "step-00000001"]


def test_a_bug_in_the_thread_of_one_rank_reaches_all(tmp_path, monkeypatch):
    failing_on(monkeypatch, "model-00002", ZeroDivisionError("ours"))
    tensors = random_tensors(CONFIG)

    def work(rank, ranks, background):
        with background:
            save_checkpoint(
                tmp_path, FakeState(tensors, 2, rank, ranks), **save_arguments(CONFIG), background=background
            )

    (_, first), (_, second) = on_ranks(2, work)
    assert isinstance(second, ZeroDivisionError)
    assert isinstance(first, RuntimeError)
    assert "ZeroDivisionError: ours" in str(first)
    assert not list(tmp_path.iterdir())


def no_memory(*_):
    raise RuntimeError("cannot allocate memory")


def test_too_little_memory_for_the_copy_of_one_rank_is_told_to_all(tmp_path, monkeypatch):
    tensors = random_tensors(CONFIG)

    def work(rank, ranks, background):
        state = FakeState(tensors, 2, rank, ranks)
        if rank == 1:  # it must go on reading with the others all the same
            monkeypatch.setattr(background.copy, "_buffer", no_memory)
        with background:
            save_checkpoint(tmp_path, state, **save_arguments(CONFIG), background=background)

    outcomes = on_ranks(2, work)
    assert all(isinstance(e, RuntimeError) and "cannot allocate memory" in str(e) for _, e in outcomes), outcomes
    assert not list(tmp_path.iterdir())


def test_the_copy_is_of_what_this_rank_writes_and_its_memory_is_used_again():
    ranks, tensors = ThreadRanks(2), random_tensors(CONFIG)

    def work(rank):
        state, copy = FakeState(tensors, 2, rank, ranks), HostCopy()
        copy.take(stream(state, torch.bfloat16), torch.bfloat16)
        first = {name: (tensor.data_ptr(), tensor.clone()) for _, name, tensor in copy}
        for tensor in state.held.values():
            tensor.mul_(2.0)
        copy.take(stream(state, torch.bfloat16), torch.bfloat16)
        for _, name, tensor in copy:
            where, before = first.pop(name)
            assert tensor.data_ptr() == where
            assert torch.equal(tensor, 2 * before)
        assert not first
        return sum(tensor.nbytes for _, _, tensor in copy)

    outcomes = ranks.run(work)
    assert [error for _, error in outcomes] == [None, None]
    # weights in bf16, master and two moments in fp32, of each parameter once over the ranks
    parameters = sum(tensor.numel() for (_, kind), tensor in tensors.items() if kind == "weight")
    assert sum(nbytes for nbytes, _ in outcomes) == 14 * parameters


def save_and_raise(root, background, error):
    with background:
        save_checkpoint(root, FakeState(random_tensors(CONFIG)), **save_arguments(CONFIG), background=background)
        raise error


def test_a_failure_of_training_waits_for_the_save_and_goes_on_its_way(tmp_path, disk):
    background = Background(ALONE, unheard)
    threading.Timer(0.2, disk.goes.set).start()
    with pytest.raises(ZeroDivisionError):
        save_and_raise(tmp_path, background, ZeroDivisionError())
    assert find_resumable(tmp_path, report=unheard).name == "step-00000100"


def test_a_failure_of_training_does_not_hide_that_of_the_save(tmp_path, monkeypatch):
    failing_on(monkeypatch, "model", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    told = []
    background = Background(ALONE, told.append)
    with pytest.raises(ZeroDivisionError):
        save_and_raise(tmp_path, background, ZeroDivisionError())
    assert len(told) == 1
    assert "no space left" in told[0]


def test_an_interrupt_waits_for_nothing(tmp_path, disk):
    background = Background(ALONE, unheard)
    with pytest.raises(KeyboardInterrupt):
        save_and_raise(tmp_path, background, KeyboardInterrupt())
    assert find_resumable(tmp_path, report=unheard) is None
    disk.goes.set()
    background.wait()


def test_waiting_shows_that_the_save_goes_on(tmp_path, monkeypatch):
    """Whoever watches over hangs must not end a run that waits for a slow disk."""
    told = []
    background = Background(ALONE, unheard, told.append)
    background.copy._tensors = {("model", str(i)): torch.zeros(1) for i in range(3)}

    def slowly():
        for _ in background.copy:
            time.sleep(1.2)

    background.start(slowly)
    background.wait()
    assert len(told) >= 2
    assert background.copy.given == 3

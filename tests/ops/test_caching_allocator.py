"""Tensors keep their contents, what is freed is used again, and what cannot be served is torch's."""

import os
import random
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from moe_llm.config import load_config
from moe_llm.distributed.runtime import start
from moe_llm.ops import caching_allocator

MIB = 2**18  # fp32 elements


@pytest.fixture
def allocator():
    if not caching_allocator.start():
        pytest.skip("no Linux, or no compiler")
    caching_allocator.empty_cache()
    yield caching_allocator
    caching_allocator.stop()


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def python(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def exercise(seed, rounds=400):
    """Tensors of all sizes come and go, each full of a number of its own, which it must still have in the end."""
    choose, live = random.Random(seed), []
    for i in range(rounds):
        if live and choose.random() < 0.5:
            number, x = live.pop(choose.randrange(len(live)))
            assert x.eq(number).all()
        else:
            size = int(2 ** choose.uniform(8, 21))
            live.append((seed * rounds + i, torch.full((size,), float(seed * rounds + i))))
    for number, x in live:
        assert x.eq(number).all()


def test_tensors_keep_their_contents(allocator):
    before = allocator.bytes_in_use()
    exercise(0)
    assert allocator.bytes_in_use() == before


def test_threads_at_once(allocator):
    before, failed = allocator.bytes_in_use(), []

    def run(seed):
        try:
            exercise(seed, rounds=200)
        except AssertionError as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert allocator.bytes_in_use() == before


@pytest.mark.parametrize(
    ("elements", "comes_from_it"), [(2**13, False), (2**14, True), (MIB, True), (5 * MIB + 1, True)]
)
def test_large_tensors_come_from_it(allocator, elements, comes_from_it):
    before, page = allocator.bytes_in_use(), os.sysconf("SC_PAGE_SIZE")
    x = torch.empty(elements)
    taken = allocator.bytes_in_use() - before
    assert taken == (-(-4 * elements // page) * page if comes_from_it else 0)
    del x
    assert allocator.bytes_in_use() == before


def test_a_step_takes_what_the_last_has_freed(allocator):
    def step():
        kept = [torch.ones(size * MIB // 2) for size in (3, 8, 5, 1, 12)]
        return sum(x.numel() for x in kept)

    step()
    reached, faults = allocator.bytes_reached(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step()
    assert allocator.bytes_reached() == reached
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 1000  # 71,000 pages were written


def test_neighbours_become_one(allocator):
    parts = [torch.empty(MIB) for _ in range(8)]
    reached = allocator.bytes_reached()
    for i in (3, 0, 1, 7, 5, 6, 4, 2):
        parts[i] = None
    whole = torch.empty(8 * MIB)
    assert allocator.bytes_reached() == reached
    del whole


def test_the_smallest_fitting_block_is_taken(allocator):
    blocks = [torch.empty(size * MIB) for size in (9, 1, 4, 1, 6, 1)]
    addresses = {size: blocks[i].data_ptr() for i, size in ((0, 9), (2, 4), (4, 6))}
    for i in (0, 2, 4):
        blocks[i] = None
    for size in (5, 4, 7):
        blocks.append(torch.empty(size * MIB))
    assert [x.data_ptr() for x in blocks[-3:]] == [addresses[6], addresses[4], addresses[9]]


def test_what_is_kept_goes_back_when_asked(allocator):
    lives = torch.full((8 * MIB,), 3.0)
    gone = torch.ones(64 * MIB)
    after_it = torch.full((8 * MIB,), 5.0)
    del gone
    before = resident()
    caching_allocator.empty_cache()
    assert before - resident() > 60 * 2**20
    assert lives.eq(3).all()
    assert after_it.eq(5).all()
    assert torch.zeros(64 * MIB).eq(0).all()


def test_it_runs_for_a_while(allocator):
    before = allocator.bytes_in_use()
    with caching_allocator.running():
        pass
    first = torch.ones(2 * MIB)
    assert allocator.bytes_in_use() == before + first.nbytes
    caching_allocator.stop()
    plain = torch.ones(2 * MIB)
    with caching_allocator.running():
        own = torch.ones(2 * MIB)
    other = torch.ones(2 * MIB)
    assert allocator.bytes_in_use() == before + first.nbytes + own.nbytes
    del plain, other  # each goes where it came from
    assert allocator.bytes_in_use() == before + first.nbytes + own.nbytes
    del first, own
    assert allocator.bytes_in_use() == before


def test_others_who_hold_on_to_the_memory(allocator):
    before = allocator.bytes_in_use()
    array = torch.full((2 * MIB,), 7.0).numpy()
    assert allocator.bytes_in_use() > before
    assert (array == 7).all()
    del array
    x = torch.full((MIB,), 2.0)
    x.untyped_storage().resize_(4 * x.untyped_storage().nbytes())
    assert x.eq(2).all()
    x.share_memory_()
    assert x.eq(2).all()
    assert allocator.bytes_in_use() == before


def test_what_is_larger_than_memory_is_torch_s_error(allocator):
    with pytest.raises(RuntimeError, match="memory"):
        torch.empty(2**58)


def test_the_profiler_counts_them(allocator):
    with torch.profiler.profile(profile_memory=True) as profile:
        x = torch.empty(3 * MIB)
        del x
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert changes == [3 * 2**20, -3 * 2**20]


def test_forked_children_go_on(allocator):
    """A child that is forked while another thread allocates does not find the allocator locked for ever."""
    program = """
import os, threading, torch
from moe_llm.ops import caching_allocator
assert caching_allocator.start()
done = False
def churn():
    while not done:
        torch.empty(2**15), torch.empty(2**19)
thread = threading.Thread(target=churn)
thread.start()
for _ in range(100):
    child = os.fork()
    if not child:
        x = torch.empty(2**15), torch.empty(2**19)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
done = True
thread.join()
print("fine")
"""
    result = python(program)
    assert result.stdout == "fine\n", result.stderr


@pytest.mark.parametrize("variable", ["MOE_LLM_CACHING_ALLOCATOR", "MOE_LLM_NATIVE"])
def test_it_can_be_done_without(variable):
    program = """
import torch
from moe_llm.ops import caching_allocator
assert not caching_allocator.start()
with caching_allocator.running():
    x = torch.ones(2**20)
caching_allocator.stop()
caching_allocator.empty_cache()
print(caching_allocator.bytes_in_use(), caching_allocator.bytes_reached())
"""
    result = python(program, **{variable: "0"})
    assert (result.stdout, result.stderr) == ("0 0\n", "")


@pytest.mark.parametrize(
    ("limit", "environment", "why"),
    [
        ("", {"CXX": "no-such-compiler", "XDG_CACHE_HOME": "/nonexistent"}, "CACHING_ALLOCATOR=0 does without it"),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))", {}, "addresses: Cannot allocate"),
    ],
)  # fmt: skip
def test_where_it_cannot_be_had_a_warning_says_so(allocator, limit, environment, why):
    program = f"""
import torch
from moe_llm.ops import caching_allocator
{limit}
assert not caching_allocator.start()
assert not caching_allocator.start()
print(torch.ones(2**20).sum().item())
"""
    result = python(program, **environment)
    assert result.stdout == "1048576.0\n", result.stderr
    assert result.stderr.count("the caching allocator is not there") == 1
    assert why in result.stderr


def test_a_run_has_it_from_start_to_close(allocator):
    caching_allocator.stop()
    config = load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml", ["train.device=cpu"])

    def comes_from_it():
        before = allocator.bytes_in_use()
        x = torch.empty(MIB)
        return allocator.bytes_in_use() - before == x.nbytes

    assert not comes_from_it()
    runtime = start(config)
    assert comes_from_it()
    runtime.close()
    assert not comes_from_it()


def test_another_torch_has_a_library_of_its_own(monkeypatch):
    before = caching_allocator._flags()
    monkeypatch.setattr(torch, "__version__", "1.2.3")
    assert caching_allocator._flags() != before


def test_a_run_without_it_compiles_nothing():
    """As on a GPU, where a run never starts it, but ends it all the same."""
    program = """
from moe_llm.ops import caching_allocator
caching_allocator.empty_cache()
caching_allocator.stop()
print(caching_allocator.bytes_in_use(), caching_allocator.bytes_reached())
"""
    result = python(program, CXX="no-such-compiler", XDG_CACHE_HOME="/nonexistent")
    assert (result.stdout, result.stderr) == ("0 0\n", "")

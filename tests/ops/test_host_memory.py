"""What a step frees is there for the next one, with fewer new pages, and nothing of a process is replaced for it."""

import os
import subprocess
import sys

import pytest
import torch

from moe_llm.ops import host_memory

pytestmark = pytest.mark.skipif(not host_memory._is_glibc(), reason="malloc is not glibc's")
_COUNT_PAGES = """
import resource, sys, torch
from moe_llm.ops import host_memory
if sys.argv[1] == "keep":
    print(host_memory.keep_freed())
def step():
    generator, held = torch.Generator().manual_seed(0), []
    for _ in range(60):  # blocks of 64 KiB to 16 MiB, of which 12 are in use at a time
        held.append(torch.ones(int(torch.randint(2**14, 2**22, (), generator=generator))))
        if len(held) > 12:
            held.pop(int(torch.randint(12, (), generator=generator)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(how: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _COUNT_PAGES, how], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert not done.returncode, done.stderr
    return done.stdout.split()


def test_freed_memory_is_used_again_with_fewer_new_pages():
    kept, new = pages("keep"), pages("plain")
    assert kept[0] == "True"
    assert int(kept[1]) < 0.7 * int(new[0])


def test_what_the_user_has_set_stays():
    assert pages("keep", MALLOC_MMAP_THRESHOLD_="65536")[0] == "False"


def test_trim_returns_memory_to_the_system():
    host_memory.keep_freed()
    small = [torch.ones(2**18) for _ in range(200)]  # 200 MiB in blocks below the threshold
    held = _resident()
    del small
    host_memory.trim()
    assert _resident() < held - 150 * 2**20


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

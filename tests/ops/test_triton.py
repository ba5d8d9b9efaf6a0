"""Triton's kernels where they can run: in its interpreter on a CPU, compiled on a GPU. And which of them are on."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_llm.errors import UserError
from moe_llm.ops import triton
from moe_llm.ops.expert_mlp import choose_backend

ROOT = Path(__file__).parents[2]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("interpreted", ["1", pytest.param("0", marks=[pytest.mark.gpu, needs_cuda])])
def test_kernels_equal_their_references(interpreted):
    """In a process of its own: Triton decides at its import whether it interprets."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--durations=5",
            str(Path(__file__).with_name("triton_kernels.py")),
        ],
        env={**os.environ, "TRITON_INTERPRET": interpreted},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    assert int(passed[1]) >= 20
    skipped = int((re.search(r"(\d+) skipped", done.stdout) or [0, 0])[1])
    assert skipped <= (2 if interpreted == "0" else 0)


def test_which_parts_are_on(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(triton, "available", lambda: True)
    monkeypatch.setattr("moe_llm.ops.expert_mlp.grouped_mm_fits", lambda *_: True)

    def chosen(environment: str | None, dtype=torch.bfloat16):
        monkeypatch.setattr(triton, "_enabled", None)
        monkeypatch.delenv("MOE_LLM_TRITON", raising=False)
        if environment is not None:
            monkeypatch.setenv("MOE_LLM_TRITON", environment)
        return choose_backend(cuda, dtype, (64, 8, 32, 32))

    assert [chosen(None), chosen("0"), chosen("norm,rope"), chosen("1"), chosen("norm, experts")] == [
        "grouped", "grouped", "grouped", "triton", "triton",
    ]  # fmt: skip
    assert chosen("1", torch.float64) == "grouped"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert [chosen("0"), chosen("1")] == ["fused", "triton"]
    with pytest.raises(UserError, match=r"MOE_LLM_TRITON names 'exprts'.*experts, swiglu"):
        chosen("exprts")
    triton.enable(["experts"])
    assert triton.enabled() == {"experts"}
    monkeypatch.setattr(triton, "available", lambda: False)
    assert choose_backend(cuda, torch.bfloat16, (64, 8, 32, 32)) == "fused"
    assert not triton.fits(torch.empty(1))

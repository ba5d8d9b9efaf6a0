"""liger-kernel's kernels equal our reference operations: in Triton's interpreter on a CPU, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_llm.errors import UserError
from moe_llm.ops import compiled, kernels, liger

CPU = torch.device("cpu")
needed = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton")),
    reason="needs liger-kernel and triton",
)


@pytest.fixture(autouse=True)
def as_before():
    yield
    kernels.choose("torch", False, CPU)


@needed
def test_norm_rotary_activation_and_loss_equal_the_reference():
    """Forward and backward, in fp32; rows without a label; fewer key-value heads."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("liger_kernels.py"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["norm", "add_norm", "rope", "swiglu", "loss"]


def test_liger_without_a_device_is_refused_in_a_sentence():
    with pytest.raises(UserError, match=r"train\.kernels=liger needs a CUDA device"):
        kernels.choose("liger", False, CPU)


def test_auto_takes_it_where_it_runs_and_torch_never(monkeypatch):
    like = torch.empty(1)
    kernels.choose("auto", False, CPU)
    assert not liger.use("norm", like)
    monkeypatch.setattr(liger, "available", lambda device: True)
    kernels.choose("auto", False, CPU)
    assert liger.use("norm", like)
    assert not liger.use("norm", like, like.bfloat16())  # one dtype alone
    kernels.choose("torch", True, CPU)
    assert not liger.use("norm", like)
    assert compiled.on

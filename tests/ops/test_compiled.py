"""Compiled regions compute what the plain functions do, and are compiled once for all sizes of batch."""

import pytest
import torch
from support.training import MODEL, config, difference, train_steps
from torch._dynamo.utils import counters

from moe_llm.config.load import validate
from moe_llm.errors import UserError
from moe_llm.ops import compiled, native


@pytest.fixture(autouse=True)
def plain_afterwards():
    torch._dynamo.reset()
    counters.clear()
    yield
    compiled.enable(False)
    torch._dynamo.reset()


def test_a_run_with_compiled_regions_equals_one_without(monkeypatch):
    """All regions are in it: the kernels for CPUs, which take their place, are off."""
    monkeypatch.setattr(native, "fits", lambda *_: False)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")  # the graphs that inductor takes, without its compiler
    model = {**MODEL, "num_shared_experts": 1}
    model |= {"num_hidden_layers": 1}
    expected = train_steps(config(2, 1, 1, model=model), 2)
    found = train_steps(config(2, 1, 1, model=model, train={"compile": True}), 2)
    assert counters["stats"]["unique_graphs"] >= 5
    assert not counters["graph_break"]
    worst, where = difference([found], expected, "weights")
    assert worst < 1e-5, where
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)


def test_other_numbers_of_tokens_compile_nothing_new(monkeypatch):
    monkeypatch.setattr(native, "fits", lambda *_: False)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    from moe_llm.ops.rope import apply_rotary, rotary_cos_sin

    compiled.enable(True)
    for length in (5, 7, 12, 30):
        cos, sin = rotary_cos_sin(torch.arange(length).expand(2, length), 8, 1e4)
        apply_rotary(torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8), cos, sin)
        if length == 7:
            before = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == before > 0


@pytest.mark.grid
def test_inductor_compiles_them_all(monkeypatch):
    monkeypatch.setattr(native, "fits", lambda *_: False)
    expected = train_steps(config(2, 1, 1), 2)
    found = train_steps(config(2, 1, 1, train={"compile": True}), 2)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)


def test_recomputation_beside_it_is_refused():
    raw = config(2, 1, 1).model_dump(mode="json")
    raw["train"] |= {"compile": True, "activation_checkpointing": "full"}
    with pytest.raises(UserError, match=r"train\.compile.*activation_checkpointing"):
        validate(raw)

"""AdamW on bf16 weights loses nothing on average, and with compensation nothing at all."""

import pytest
import torch

from moe_llm.distributed.engine import add_compensation
from moe_llm.distributed.state import COMPENSATION, split, wide
from moe_llm.train.bf16_adamw import BF16AdamW, stochastically_rounded

STEPS, LR = 100, 1e-4


def trained(weight: torch.Tensor, make) -> tuple[torch.Tensor, dict]:
    """After steps whose gradients differ in size."""
    parameter = torch.nn.Parameter(weight)
    optimizer = make([parameter])
    for step in range(STEPS):
        parameter.grad = torch.full_like(parameter, 1.0 + step / 64)  # a number of bf16
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def narrow(compensated: bool):
    def make(parameters: list) -> BF16AdamW:
        optimizer = BF16AdamW([{"params": parameters, "weight_decay": 0.1}], LR, (0.9, 0.95), 1e-8)
        if compensated:
            add_compensation(optimizer, parameters)
        return optimizer

    return make


def exact(parameters: list) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


@pytest.fixture(scope="module")
def start() -> torch.Tensor:
    return torch.randn(20_000, generator=torch.Generator().manual_seed(0)).add(1.0).bfloat16()


def test_rounding_to_the_nearest_loses_the_updates_that_both_remedies_keep(start):
    expected = trained(start.float(), exact)[0]
    moved = (expected - start.float()).mean()
    nearest = trained(start.clone(), exact)[0].float()
    assert (nearest - start.float()).mean().abs() < 0.7 * moved.abs(), "then no remedy were needed"
    torch.manual_seed(1)
    by_chance = trained(start.clone(), narrow(False))[0].float()
    assert (by_chance - start.float()).mean() == pytest.approx(moved.item(), rel=0.05)
    compensated, state = trained(start.clone(), narrow(True))
    left, lost = (wide(compensated, state) - expected).norm(), (nearest - expected).norm()
    assert left < 0.05 * lost


def test_moments_are_those_of_torch(start):
    _, expected = trained(start.float(), exact)
    _, found = trained(start.clone(), narrow(True))
    for moment in ("exp_avg", "exp_avg_sq"):
        assert found[moment].dtype == torch.float32
        torch.testing.assert_close(found[moment], expected[moment])
    assert found["step"] == STEPS
    assert found[COMPENSATION].dtype == torch.bfloat16


def test_weights_of_more_than_a_chunk_are_updated_whole(start, monkeypatch):
    import moe_llm.train.bf16_adamw as module

    whole = trained(start.clone(), narrow(True))[0]
    monkeypatch.setattr(module, "_CHUNK", 7)
    small = start[:100].reshape(4, 25).clone()
    assert torch.equal(trained(small, narrow(True))[0].flatten(), whole[:100])


def test_stochastic_rounding_has_no_bias_and_leaves_bf16_numbers_alone(start):
    torch.manual_seed(0)
    assert torch.equal(stochastically_rounded(start.float()), start)
    value = torch.full((200_000,), 1.0 + 0.3 / 128)
    rounded = stochastically_rounded(value).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 1 / 128}
    assert rounded.mean().item() == pytest.approx(value[0].item(), abs=1e-4)
    assert torch.equal(stochastically_rounded(-torch.ones(8)), -torch.ones(8).bfloat16())


def test_two_bf16_tensors_hold_sixteen_bits():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    high, low = split(values)
    assert ((high.float() + low.float() - values).abs() <= values.abs() * 2**-15).all()
    again = split(high.float() + low.float())
    assert torch.equal(again[0], high)
    assert torch.equal(again[1], low)

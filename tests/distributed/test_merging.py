"""Experts' weights mixed over ranks that each hold some of them: values and gradients are one process's, whatever
number of segments a rank has."""

import pytest
import torch
from support.ranks import fresh_accelerate
from support.training import MODEL, config, difference, train_steps

from moe_llm.config import ModelConfig
from moe_llm.config.load import validate
from moe_llm.distributed.dispatch import AllToAllDispatcher
from moe_llm.distributed.runtime import start
from moe_llm.model.moe.experts import MoELayer

LENGTH = 10
LORY = {**MODEL, "num_experts_per_tok": 1, "router": {"type": "lory", "segment_length": 4}}
# sequences of each rank
SHARES = {"even": [2, 2], "uneven": [3, 1], "a_rank_without_sequences": [0, 2], "nobody_has_any": [0, 0]}


def layer_of(dtype: torch.dtype) -> MoELayer:
    layer, generator = MoELayer(ModelConfig(**LORY)), torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.4, generator=generator)
    return layer.to(dtype)


def inputs(rank: int, sequences: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + rank)
    x_BSD = torch.randn(sequences, LENGTH, MODEL["hidden_size"], generator=generator).to(dtype).requires_grad_()
    mask_BS = torch.arange(LENGTH) < torch.tensor([LENGTH, 7, 3])[:sequences, None]
    return x_BSD, mask_BS


def outcome(layer: MoELayer, x_BSD: torch.Tensor, mask_BS: torch.Tensor) -> tuple:
    y_BSD, statistics = layer(x_BSD, mask_BS)
    (y_BSD * y_BSD * mask_BS[..., None]).sum().backward()
    return y_BSD.detach(), x_BSD.grad, statistics.probability_sum_E.detach()


def merged(shares: list[int], dtype: torch.dtype) -> tuple:
    """On a rank: what `outcome` says, then the gradients of router and experts, then the bytes sent."""
    fresh_accelerate()
    runtime = start(config(1, 1, 2, ep=2))
    layer = layer_of(dtype)
    layer.experts.keep(range(runtime.rank * 2, runtime.rank * 2 + 2))
    layer.dispatcher = AllToAllDispatcher(torch.distributed.group.WORLD, 2)
    result = outcome(layer, *inputs(runtime.rank, shares[runtime.rank], dtype))
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return *result, gradients, layer.dispatcher.traffic.take()[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shares", SHARES)
def test_ranks_equal_one_process(two_ranks, shares, dtype):
    found, whole = two_ranks.run(merged, SHARES[shares], dtype), layer_of(dtype)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-1}
    for rank, (*theirs, _, _) in enumerate(found):
        ours = outcome(whole, *inputs(rank, SHARES[shares][rank], dtype))
        for expected, value in zip(ours, theirs, strict=True):
            torch.testing.assert_close(value, expected, **near)
    for name, parameter in whole.named_parameters():
        parts = [gradients[name] for *_, gradients, _ in found]
        value = torch.cat(parts) if name.startswith("experts") else sum(parts)
        torch.testing.assert_close(value, parameter.grad, **near)
    weights = sum(p.numel() * p.element_size() for n, p in whole.named_parameters() if n.startswith("experts"))
    assert [sent for *_, sent in found] == [3 * weights // 2] * 2  # forward, backward and the gradients


def run_of(world: int, stage: int):
    sections = {"train": {"activation_checkpointing": True}, "model": LORY}
    return config(
        4 // world,
        1,
        world,
        ep=world,
        stage=stage,
        **{
            name: {**config(4 // world, 1, world, ep=world, stage=stage).model_dump(mode="json")[name], **values}
            for name, values in sections.items()
        },
    )


def on_ranks(stage: int) -> dict:
    return train_steps(run_of(2, stage), 3)


@pytest.mark.parametrize("stage", [2, 3])
def test_training_with_recomputation_equals_one_process(two_ranks, stage):
    found, expected = two_ranks.run(on_ranks, stage), train_steps(run_of(1, 1), 3)
    for per_rank in found:
        assert per_rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert per_rank["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    for what, tolerance in (("gradients", 2e-5), ("weights", 1e-4)):
        worst, where = difference(found, expected, what)
        assert worst < tolerance, f"{what} of {where}"


def test_the_settings_read_back():
    assert validate(run_of(2, 3).model_dump(mode="json")) == run_of(2, 3)

"""A MoE layer's forward and backward pass never waits for the device: no operation's result is needed on the host."""

import pytest
import torch
from support.rehearsed import cluster_config
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_llm.config import ModelConfig
from moe_llm.distributed.rehearsal import rehearse
from moe_llm.model.moe.experts import MoELayer
from moe_llm.ops import kernels, native

CONFIG = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def step(device, **changes):
    """Forward and backward of one layer; returns what to look at afterwards."""
    dtype, usual = torch.bfloat16, torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # since tensors without values cannot be converted in a module
    try:
        with torch.device(device):
            layer = MoELayer(ModelConfig(**CONFIG, **changes))
    finally:
        torch.set_default_dtype(usual)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.1)
    x = torch.randn(2, 24, 32, device=device, dtype=dtype, requires_grad=True)
    real = torch.ones(2, 24, dtype=torch.bool, device=device)

    def run():
        y, statistics = layer(x, real)
        loss = y.float().square().sum() + statistics.z_sum + statistics.sequence_balance
        (loss + statistics.probability_sum_E.square().sum()).backward()
        return x.grad

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router_aux_loss_scope": "sequence", "router_jitter_noise": 0.1},
        {"router": {"type": "soft_moe", "slots_per_expert": 2, "segment_length": 4}},
        {"router": {"type": "multi_head", "heads": 2}},
    ],
)
def test_nothing_depends_on_values(monkeypatch, changes):
    """Tensors without values, on which whatever asks for one raises: the operations are those that CUDA gets."""
    monkeypatch.setattr(native, "fits", lambda *_: False)
    monkeypatch.setattr("moe_llm.ops.expert_mlp.choose_backend", lambda *_: "grouped")
    with FakeTensorMode():
        assert step("cpu", **changes)().shape == (2, 24, 32)


def test_what_waits_is_noticed(monkeypatch):
    monkeypatch.setattr(native, "fits", lambda *_: False)
    monkeypatch.setattr("moe_llm.ops.expert_mlp.choose_backend", lambda *_: "fused")  # which reads the counts
    with FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"):
        step("cpu")()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_the_dispatcher_waits_for_sizes_alone(capability):
    """Of 2 layers, whose experts are spread over 8 ranks: once a layer, whatever the kernels need to know of the counts."""
    rehearsed = rehearse(cluster_config(ep=8), 8, capability=capability)
    assert not rehearsed.faults
    assert rehearsed.waits_named() == {"rows that each rank sends and receives": 2}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("chosen", "compiled"), [("torch", False), ("auto", False), ("torch", True)])
def test_no_synchronisation_on_cuda(chosen, compiled):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch's grouped product waits before Hopper")
    kernels.choose(chosen, compiled, torch.device("cuda"))
    run = step("cuda")
    run()  # compiles and tunes, which does wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grad = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        kernels.choose("torch", False, torch.device("cuda"))
    assert grad.isfinite().all()

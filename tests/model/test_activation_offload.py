"""What layers keep in host memory comes back as it was, once for all that keep it; tiles add up to the whole."""

import pytest
import torch
from support.training import MODEL

from moe_llm.config import ModelConfig
from moe_llm.model import activation_offload
from moe_llm.model.activation_offload import Offload, unpack
from moe_llm.model.init import build_model
from moe_llm.model.moe.experts import Experts

IDS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def gradients(router: str = "mixtral", **saving) -> tuple[float, dict[str, torch.Tensor]]:
    model = build_model(ModelConfig(**MODEL, num_shared_experts=1, router={"type": router}), 0).train()
    model.save_memory(**{"recompute": False, **saving})
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple]:
    return {router: gradients(router) for router in ("mixtral", "top_p")}


@pytest.mark.parametrize("router", ["mixtral", "top_p"])
@pytest.mark.parametrize("recompute", [False, "full", "selective"])
def test_offload_changes_no_bit(plain, recompute, router):
    loss, found = gradients(router, recompute=recompute, offload=True)
    assert loss == plain[router][0]
    for name, expected in plain[router][1].items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("router", ["mixtral", "top_p"])
@pytest.mark.parametrize("saving", [{"tiles": 3}, {"tiles": 5, "recompute": "full"}, {"tiles": 2, "offload": True}])
def test_tiles_add_up_to_the_whole(plain, saving, router):
    loss, found = gradients(router, **saving)
    assert loss == pytest.approx(plain[router][0], rel=1e-6)
    for name, expected in plain[router][1].items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_tiles_hold_the_projections_of_one_part_alone():
    """The largest tensor that stays for the backward pass is none of a projection's rows."""
    experts = Experts(ModelConfig(**{**MODEL, "intermediate_size": 400}))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    rows = torch.randn(64, 24, requires_grad=True)
    counts = torch.tensor([20, 0, 30, 14])

    def kept(tiles: int) -> int:
        experts.tiles, sizes = tiles, []
        weights = {p.untyped_storage().data_ptr() for p in experts.parameters()}

        def pack(t):
            sizes.append(0 if t.untyped_storage().data_ptr() in weights else t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            experts(rows, counts)
        return max(sizes)

    assert kept(1) >= 64 * 400
    assert kept(4) <= 64 * 24


def test_each_layers_tensors_are_copied_once_and_let_go(monkeypatch):
    """And parameters, like what all layers share, stay where they are."""
    made, held = [], []
    whole = activation_offload._Held.__init__

    def count(self, value, offload, layer):
        made.append((layer, value.data_ptr(), tuple(value.shape), value.stride()))
        whole(self, value, offload, layer)
        held.append(self)

    monkeypatch.setattr(activation_offload._Held, "__init__", count)
    model = build_model(ModelConfig(**MODEL), 0).train()
    model.save_memory("full", offload=True)
    model(IDS, labels=IDS).loss.backward()
    assert {layer for layer, *_ in made} == {0, 1}
    assert len(set(made)) == len(made)
    parameters = {p.data_ptr() for p in model.parameters()}
    assert not parameters & {pointer for _, pointer, *_ in made}
    assert all(one.fetched is None for one in held)


def test_what_is_changed_afterwards_comes_back_as_it_was_kept():
    offload = Offload(torch.device("cpu"), [])
    value = torch.arange(6.0).view(2, 3).t()
    with offload.layer():
        kept = [offload.pack(value), offload.pack(value)]
    assert kept[0] is kept[1]
    value.zero_()
    for one in kept:
        back = unpack(one)
        assert back.stride() == (1, 3)
        assert back.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_small_tensors_and_shared_ones_stay():
    shared = torch.zeros(2**16)
    offload = Offload(torch.device("cpu"), [shared])
    offload._smallest = 2**16
    with offload.layer():
        assert offload.pack(shared[1:]).data_ptr() == shared[1:].data_ptr()
        assert isinstance(offload.pack(torch.zeros(8)), torch.Tensor)
        assert not isinstance(offload.pack(torch.zeros(2**14)), torch.Tensor)

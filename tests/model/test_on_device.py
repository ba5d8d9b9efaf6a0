"""The decoder on a device, in fp32 and bf16, is the decoder in double precision on the host: every router, with packed
documents, a window and recomputation. The cases run on the host as well, so that they are known to hold before a GPU is."""

import copy

import pytest
import torch
from test_router_invariance import CASES, model_of
from test_routers import config_of

from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.init import init_weights
from moe_llm.ops import kernels

NO_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_DEVICE])]
LENGTHS = (17, 3, 12)


def batch(device: str, vocabulary: int = 40) -> dict[str, torch.Tensor]:
    """Two blocks of three documents each, with targets within a document."""
    ids_BS = torch.randint(0, vocabulary, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    targets_BS = ids_BS.roll(-1, 1)
    targets_BS[:, [sum(LENGTHS[: i + 1]) - 1 for i in range(3)]] = -100
    named = {
        "input_ids": ids_BS,
        "targets": targets_BS,
        "document_ids": torch.arange(3).repeat_interleave(torch.tensor(LENGTHS)).expand(2, -1),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS]).expand(2, -1),
    }
    return {name: tensor.to(device) for name, tensor in named.items()} | {"runs": [LENGTHS, LENGTHS]}


def loss_and_gradients(model: MoEDecoder, inputs: dict) -> dict[str, torch.Tensor]:
    output = model(**inputs)
    (output.loss_sum / output.num_targets + 0.01 * output.aux_loss).backward()
    found = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": output.loss_sum.double().cpu() / output.num_targets.cpu()}


def departure(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each by its norm, or by the largest of all where it is next to nothing."""
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * max(value.norm().item() for value in theirs.values())
    return {n: ((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(floor)).item() for n in theirs}


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda":
        kernels.choose("auto", False, torch.device("cuda"))
    yield request.param
    if request.param == "cuda":
        kernels.choose("torch", False, torch.device("cuda"))


@pytest.mark.parametrize("case", CASES)
def test_every_router_learns_as_in_double_precision_on_the_host(case, device):
    model = model_of(case)
    exact = loss_and_gradients(copy.deepcopy(model).double(), batch("cpu"))
    found = departure(loss_and_gradients(model.to(device), batch(device)), exact)
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("save", [{}, {"recompute": "full"}, {"recompute": "selective"}, {"tiles": 3, "offload": True}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_whatever_is_saved_for_the_backward_pass_learns_the_same(save, dtype, tolerance, device):
    """At widths that the grouped kernels take, with a window; bf16 weights are the same numbers in both."""
    more = {"hidden_size": 64, "intermediate_size": 48, "sliding_window": 5, "head_dim": 16, "initializer_range": 0.05}
    model = MoEDecoder(config_of("dense", 6, {}, **more)).train()
    init_weights(model, 0)
    model.to(dtype)
    exact = loss_and_gradients(copy.deepcopy(model).double(), batch("cpu"))
    model.to(device).save_memory(
        save.get("recompute", False), offload=save.get("offload", False), tiles=save.get("tiles", 1)
    )
    found = departure(loss_and_gradients(model, batch(device)), exact)
    assert max(found.values()) < tolerance, found

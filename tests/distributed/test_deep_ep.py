"""The exchange by DeepEP's interface equals torch's all-to-all; it is taken where it can be, and else told why not."""

import sys
from types import ModuleType
from unittest import mock

import pytest
import torch
from support import deep_ep_package
from support.training import MODEL, config, difference, train_steps

from moe_llm.distributed import deep_ep
from moe_llm.errors import UserError

MICRO = 3


def by_package(cfg, steps: int) -> tuple[dict, list[str]]:
    """A few steps whose exchange goes by the package of the same signatures, and what was called of it."""
    deep_ep_package.Buffer.calls = []
    chosen = mock.patch.object(deep_ep, "_chosen", deep_ep_package)
    with chosen, mock.patch.object(deep_ep, "choose"), mock.patch.dict(deep_ep._buffers, clear=True):
        return train_steps(cfg, steps), deep_ep_package.Buffer.calls


def spread(router: str = "mixtral", recompute: str = "off"):
    train = {"activation_checkpointing": recompute}
    return config(MICRO, 1, 2, ep=2, stage=1, train=train, model={**MODEL, "router": {"type": router}})


@pytest.mark.parametrize("recompute", ["off", "full", "selective"])
def test_the_package_gives_what_one_process_gives(two_ranks, recompute):
    expected = train_steps(config(2 * MICRO, 1, 1), 3)
    found = two_ranks.run(by_package, spread(recompute=recompute), 3)
    worst, where = difference([result for result, _ in found], expected, "gradients")
    assert worst < 1e-5, where
    for result, calls in found:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        forward = 2 if recompute == "full" else 1
        layers, steps = 2, 3
        assert calls.count("dispatch") == layers * steps * (forward + 1)
        assert calls.count("combine") == layers * steps * 2  # a second pass ends before it


def test_routers_with_varying_rows_go_on_with_torch(two_ranks):
    found = two_ranks.run(by_package, spread("gshard"), 2)
    kept = two_ranks.run(train_steps, spread("gshard"), 2)
    for (result, calls), expected in zip(found, kept, strict=True):
        assert not calls
        assert result["losses"] == expected["losses"]


@pytest.fixture
def installed(monkeypatch):
    package = ModuleType("deep_ep")
    package.Buffer = deep_ep_package.Buffer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_ep", package)
    monkeypatch.setattr(deep_ep.importlib.util, "find_spec", lambda name: package)
    yield
    deep_ep._chosen = None


CUDA = torch.device("cuda")


def asked(exchange: str, precision: str = "bf16", **parallel):
    sizes = {"expert_parallel_size": 2, "exchange": exchange, **parallel}
    return config(1, 1, 2, train={"precision": precision}, parallel=sizes)


def test_auto_takes_the_package_where_it_can(installed):
    deep_ep.choose(asked("auto"), CUDA)
    assert deep_ep.chosen() == "DeepEP's"
    for cfg, device in (
        (asked("torch"), CUDA),
        (asked("auto"), torch.device("cpu")),
        (asked("auto", precision="fp32"), CUDA),
        (asked("auto", placement="dynamic"), CUDA),
        (asked("auto", expert_parallel_size=1), CUDA),
    ):
        deep_ep.choose(cfg, device)
        assert deep_ep.chosen() == "torch's all-to-all"


@pytest.mark.parametrize(
    ("cfg", "device", "words"),
    [
        (asked("deep_ep"), torch.device("cpu"), "needs CUDA"),
        (asked("deep_ep", precision="fp32"), CUDA, "sends bf16 alone"),
        (asked("deep_ep", placement="dynamic"), CUDA, "change ranks"),
    ],
)
def test_where_it_cannot_be_had_a_sentence_says_why(installed, cfg, device, words):
    with pytest.raises(UserError, match=f"parallel.exchange=deep_ep .*{words}.*: use auto or torch"):
        deep_ep.choose(cfg, device)


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(UserError, match="needs the package deep_ep, which is not installed"):
        deep_ep.choose(asked("deep_ep"), CUDA)

"""A run beside busy processes takes fewer threads, gives them back, and computes the same bits with any number of them."""

import functools
import time

import pytest
import torch
from support import runs

from moe_llm.bench.run import stepper, synthetic_loader
from moe_llm.config import load_config
from moe_llm.distributed.runtime import start
from moe_llm.ops import products
from moe_llm.train import build
from moe_llm.train.callbacks import shared_cores
from moe_llm.train.callbacks.base import Callback
from moe_llm.train.callbacks.registry import build_callbacks
from moe_llm.train.callbacks.shared_cores import busy_seconds, cores_taken

seen: list[int] = []


class Watch(Callback):
    def on_step_begin(self, run):
        seen.append(torch.get_num_threads())


@pytest.fixture
def three_threads(monkeypatch):
    """As on a machine of three cores where nobody has said how many threads there are to be."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("moe_llm.threads.cores", lambda: {0, 1, 2})
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("others", "now", "taken"),
    [
        (0.0, 0, 0),
        (0.5, 0, 0),  # somebody's browser
        (0.67, 0, 1),  # what one process gets beside two threads of ours on two cores
        (1.0, 1, 1),
        (0.5, 1, 1),  # neither taken nor free: as before
        (0.2, 1, 0),
        (1.9, 0, 2),
        (1.0, 2, 1),
        (-0.1, 0, 0),
    ],
)
def test_a_core_is_left_to_who_uses_most_of_it_and_taken_back_when_hardly_used(others, now, taken):
    assert cores_taken(others, now) == taken


def test_the_cores_work_is_counted_with_that_of_this_process():
    before = busy_seconds()
    assert before is not None
    limit = time.monotonic() + 60
    while busy_seconds() < before + 0.1:
        assert time.monotonic() < limit


def test_threads_follow_the_neighbours_and_come_back(make_config, tmp_path, monkeypatch, three_threads, capfd):
    from moe_llm.cli import main

    now = {"clock": 0.0, "own": 0.0, "all": 0.0}
    steps = iter([0.0, 1.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # cores that others use, a second of each

    def reading():
        now["clock"] += 1.0
        now["own"] += 1.5
        now["all"] += 1.5 + next(steps)
        return now["clock"], now["own"], now["all"]

    monkeypatch.setattr(shared_cores.SharedCores, "_reading", staticmethod(reading))
    monkeypatch.setattr(shared_cores, "_INTERVAL_SECONDS", float("-inf"))
    seen.clear()
    config = make_config(train={"max_steps": 6, "callbacks": [{"path": f"{__name__}.Watch"}]})
    assert main(["train", str(config)]) == 0
    assert seen == [3, 2, 1, 2, 3, 3]
    assert torch.get_num_threads() == 3
    told = "".join(capfd.readouterr())
    assert "other processes keep 2 of 3 cores busy: computing on 1" in told
    assert "no other process keeps a core busy any more: computing on 3" in told


def test_a_number_of_threads_that_the_user_set_stays(make_config, monkeypatch, three_threads):
    config = load_config(make_config())
    assert "shared_cores" in build_callbacks(config)
    assert "shared_cores" not in build_callbacks(load_config(make_config(), ["train.deterministic=true"]))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "shared_cores" not in build_callbacks(config)


@pytest.mark.parametrize(("precision", "router"), [("fp32", "mixtral"), ("bf16", "mixtral"), ("fp32", "noisy_top_k")])
def test_a_step_has_the_same_bits_with_any_number_of_threads(precision, router, three_threads, monkeypatch):
    """With the package's own products, which a processor may lack the instructions for; torch's promise nothing."""
    monkeypatch.setenv("MOE_LLM_PRODUCTS", "1")
    for chosen in (products._ours, products._ours_in_bf16):
        monkeypatch.setattr(products, chosen.__name__, functools.cache(chosen.__wrapped__))
    if not (products._ours_in_bf16() if precision == "bf16" else products._ours()):
        pytest.skip(f"products in {precision} are torch's on this processor")
    config = load_config(
        runs.ROOT / "configs/quickstart.yaml",
        [
            f"train.precision={precision}",
            f"model.router.type={router}",
            "model.num_hidden_layers=1",
            "train.global_batch_size=4",
            "train.micro_batch_size=4",
        ],
    )
    weights = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runtime = start(config)
        try:
            engine, _ = build.build_trained(config, runtime, None)
            with synthetic_loader(config, runtime, 1) as loader:
                stepper(config, engine, runtime, loader)()
            weights.append({name: weight.detach().clone() for name, weight in engine.model.named_parameters()})
        finally:
            runtime.close()
    for other in weights[1:]:
        assert all(torch.equal(weight, other[name]) for name, weight in weights[0].items())

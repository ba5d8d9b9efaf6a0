"""Each optimizer of the table: its library's numbers, one process or ranks, and checkpoints that hold its state."""

import shutil
import sys

import pytest
import torch
from schedulefree import AdamWScheduleFree
from support.ranks import fresh_accelerate
from support.training import config, difference, train_steps

from moe_llm.cli import main
from moe_llm.config.optim import OPTIMIZERS
from moe_llm.distributed.runtime import start
from moe_llm.errors import UserError
from moe_llm.families.hf import is_router, pieces
from moe_llm.train.build import build_trained
from moe_llm.train.optim import build_optimizer

NEW = ["muon", "lion", "schedule_free"]
RATES = {"muon": 0.02, "lion": 1e-3, "schedule_free": 5e-3}


def run_of(name: str, world: int = 1, *, rounds: int = 2, **more):
    optim = {"lr": RATES[name], "weight_decay": 0.1, "warmup_steps": 2, **more.pop("optim", {})}
    return config(4 // world, rounds, world, optimizer=name, optim=optim, **more)


def published(engine, kind: str = "weight") -> dict[str, torch.Tensor]:
    """Tensors by the names and in the shapes of the exported checkpoint."""
    found = {}
    for entry in engine.entries():
        if kind == "weight" or entry.kinds_among((kind,)):
            whole = engine.read(entry.name, kind)
            found |= {p.name: whole[p.index].clone() for p in pieces(entry.name, entry.shape, entry.first_expert)}
    return found


def reference(name: str, tensors: dict[str, torch.nn.Parameter], optim) -> list[torch.optim.Optimizer]:
    """The library's own optimizers on published tensors."""
    lr, decay = optim.lr, optim.weight_decay
    groups = [
        {"params": [p for p in tensors.values() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in tensors.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    if name == "lion":
        from lion_pytorch import Lion

        return [Lion(groups, lr=lr, betas=(0.9, 0.99))]
    if name == "schedule_free":
        return [AdamWScheduleFree(groups, lr=lr, betas=optim.betas, eps=optim.eps, warmup_steps=2, foreach=False)]
    outside = {n for n in tensors if "embed_tokens" in n or "lm_head" in n or is_router(n) or ".gate.weight" in n}
    inside = [p for n, p in tensors.items() if p.dim() == 2 and n not in outside]
    rest = [{"params": [tensors[n] for n in sorted(outside)], "weight_decay": decay}, groups[1]]
    return [
        torch.optim.Muon(inside, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=optim.betas, eps=optim.eps),
    ]


def warm(lr: float, step: int) -> float:
    return lr * min(1.0, (step + 1) / 2)


@pytest.mark.parametrize("name", NEW)
def test_updates_are_those_of_its_library_on_each_published_tensor(name):
    fresh_accelerate()
    cfg = run_of(name, optim={"grad_clip": 0.0})
    engine, _ = build_trained(cfg, start(cfg), None)
    tensors = {n: torch.nn.Parameter(t) for n, t in published(engine).items()}
    theirs = reference(name, tensors, cfg.optim)
    if name == "schedule_free":
        theirs[0].train()
    generator = torch.Generator().manual_seed(5)
    for step in range(4):
        for entry in engine.entries():
            parameter = engine.model.get_parameter(entry.name)
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.1
            for piece in pieces(entry.name, entry.shape, 0):
                tensors[piece.name].grad = parameter.grad[piece.index].clone()
        engine.step(warm(cfg.optim.lr, step))
        for optimizer in theirs:
            for group in optimizer.param_groups:
                group["lr"] = cfg.optim.lr if name == "schedule_free" else warm(cfg.optim.lr, step)
            optimizer.step()
    with engine.weights_for_use():
        if name == "schedule_free":
            theirs[0].eval()
        found = published(engine)
    for n, expected in tensors.items():
        torch.testing.assert_close(found[n], expected.detach(), rtol=1e-5, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize(("name", "stage"), [("muon", 1), ("muon", 2), ("lion", 3), ("schedule_free", 1)])
def test_two_ranks_with_expert_parallelism_are_one_process(two_ranks, name, stage):
    expected = train_steps(run_of(name), 4)
    found = two_ranks.run(train_steps, run_of(name, 2, parallel={"expert_parallel_size": 2, "zero_stage": stage}), 4)
    # signs of gradients near 0, and products in bf16, magnify rounding
    bound = {"muon": 2e-4, "lion": 2e-4, "schedule_free": 2e-5}[name]
    for per_rank in found:
        assert per_rank["losses"] == pytest.approx(expected["losses"], rel=bound)
    for kind in OPTIMIZERS[name].tensors:
        assert difference(found, expected, kind, floor=1e-5)[0] < 0.05, kind


@pytest.mark.parametrize("name", NEW)
def test_a_checkpoint_moves_between_layouts_with_its_state(two_ranks, tmp_path, name):
    alone = run_of(name)
    spread = run_of(name, 2, parallel={"expert_parallel_size": 2})
    first = train_steps(alone, 3, save=str(tmp_path / "a"))
    moved = two_ranks.run(_saved, spread, first["saved"], str(tmp_path / "b"))[0]
    straight = train_steps(alone, 2, source=first["saved"], first=3)
    back = train_steps(alone, 2, source=moved, first=3)
    exact = name != "schedule_free"  # whose weights are computed from those in use and back at each save
    assert back["losses"] == pytest.approx(straight["losses"], rel=0 if exact else 1e-6, abs=0)
    for kind in ("weights", *OPTIMIZERS[name].tensors):
        assert difference([back], straight, kind)[0] <= (0 if exact else 1e-5), kind


def _saved(cfg, source: str, save: str) -> str:
    return train_steps(cfg, 0, source=source, first=3, save=save)["saved"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim": {"name": "muon"}, "parallel": {"zero_stage": 3}}, ["parallel.zero_stage=3", "whole matrices", "1 or 2"]),
        ({"optim": {"name": "muon"}, "parallel": {"offload_optimizer": "cpu"}}, ["offload_optimizer", "muon"]),
        ({"optim": {"name": "schedule_free"}, "parallel": {"zero_stage": 3}}, ["parallel.zero_stage=3", "1 or 2"]),
        ({"optim": {"name": "schedule_free", "schedule": "cosine"}}, ["optim.schedule", "constant"]),
        ({"optim": {"name": "schedule_free"}, "checkpoint": {"ema": {"decay": 0.9}}}, ["checkpoint.ema.decay", "average"]),
        (
            {"optim": {"name": "schedule_free"}, "finetune": {"trainable": "experts", "experts": [1]}},
            ["weight_decay", "finetune.experts"],
        ),
        ({"optim": {"name": "schedule_free"}, "train": {"adversarial": {"router_every": 2}}}, ["router_every", "turns"]),
        ({"optim": {"name": "adamw", "muon": {"momentum": 0.5}}}, ["optim.muon", "adamw", "remove it"]),
    ],
)  # fmt: skip
def test_what_an_optimizer_cannot_do_is_refused_in_a_sentence(changes, words):
    with pytest.raises(UserError) as refused:
        config(4, 1, 1, **changes)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(UserError, match=r"lion_pytorch.*moe_llm\[lion\]"):
        build_optimizer([{"params": [weight]}], run_of("lion").optim)


def test_betas_that_are_not_set_are_the_optimizers_own():
    assert run_of("lion").optim.betas == (0.9, 0.99)
    assert run_of("lion", optim={"betas": [0.8, 0.7]}).optim.betas == (0.8, 0.7)
    assert run_of("muon").optim.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    "changes", [{"momentum": 0.5}, {"nesterov": False}, {"ns_steps": 3}, {"adjust_lr": "original"}]
)
def test_each_key_of_muon_acts(changes):
    plain, changed = (train_steps(run_of("muon", rounds=1, optim={"muon": muon}), 2) for muon in ({}, changes))
    assert plain["losses"][0] == changed["losses"][0]
    assert difference([changed], plain, "weights")[0] > 1e-4


@pytest.mark.parametrize("name", ["muon", "schedule_free"])
def test_a_resumed_run_is_an_uninterrupted_one_to_the_byte(make_config, tmp_path, name):
    changes = {
        "optim": {"name": name, "lr": RATES[name], "schedule": "constant", "warmup_steps": 2},
        "checkpoint": {"every_steps": 3},
        "evaluate": {"every_steps": 2, "max_blocks": 2},
    }
    for run in ("straight", "resumed"):
        assert main(["train", str(make_config(run, **changes)), "train.max_steps=6"]) == 0
        if run == "resumed":
            shutil.rmtree(tmp_path / "resumed/checkpoints/step-00000006")
            assert main(["train", str(make_config(run, **changes)), "train.max_steps=6"]) == 0
    straight, resumed = (tmp_path / run / "checkpoints/step-00000006" for run in ("straight", "resumed"))
    for file in ("model.safetensors", "trainer/optimizer.safetensors"):
        assert (straight / file).read_bytes() == (resumed / file).read_bytes(), file

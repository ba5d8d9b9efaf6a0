"""AdamW with moments of 8 bits: bitsandbytes' numbers, 2 bytes a parameter, one process or ranks, exact resuming."""

import sys
from itertools import pairwise
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from support.ranks import fresh_accelerate
from support.training import MODEL, config, difference, train_steps

from moe_llm.cli import main
from moe_llm.distributed.adamw_8bit import BLOCK, AdamW8bit, Moment, Run
from moe_llm.distributed.muon import Piece, Share
from moe_llm.distributed.runtime import start
from moe_llm.families.hf import pieces
from moe_llm.train.build import build_trained

# matrices of experts and of queries have 4096 elements and more, those of keys and values fewer
WIDE = {**MODEL, "hidden_size": 64, "intermediate_size": 64}
KINDS = ("exp_avg", "exp_avg_sq")


def run_of(world: int = 1, **more):
    return config(4 // world, 2, world, optimizer="adamw_8bit", model=WIDE, **more)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("length", [BLOCK, 10 * BLOCK + 7])
def test_what_a_moment_has_given_is_kept_to_the_bit(signed, length):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(length, generator=generator) * torch.logspace(-9, 0, length)
    values = values if signed else values.square()
    values[: BLOCK // 2] = -values[: BLOCK // 2].abs() if signed else 0.0  # blocks whose largest value is negative
    moment, again = (Moment(Run(0, length, packed=True), signed, values.device) for _ in range(2))
    moment.write(values)
    again.write(moment.read())
    assert torch.equal(moment.values, again.values)
    assert torch.equal(moment.absmax, again.absmax)
    assert (moment.read() - values).norm() < 0.02 * values.norm()


def test_updates_are_those_of_bitsandbytes_on_each_published_matrix():
    fresh_accelerate()
    cfg = run_of(optim={"grad_clip": 0.0, "weight_decay": 0.1})
    engine, _ = build_trained(cfg, start(cfg), None)
    theirs, optimizers = {}, []
    for entry in engine.entries():
        whole = engine.read(entry.name, "weight")
        for p in pieces(entry.name, entry.shape, 0):
            theirs[p.name] = torch.nn.Parameter(whole[p.index].clone())
            kind = bitsandbytes.optim.AdamW if "embed_tokens" in p.name else bitsandbytes.optim.AdamW8bit
            decay = 0.1 if whole[p.index].dim() > 1 else 0.0
            settings = {"betas": cfg.optim.betas, "eps": cfg.optim.eps, "weight_decay": decay}
            optimizers.append(kind([theirs[p.name]], lr=cfg.optim.lr, **settings))
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        for entry in engine.entries():
            parameter = engine.model.get_parameter(entry.name)
            parameter.grad = torch.randn(parameter.shape, generator=generator).abs() * 0.1  # their map is not symmetric
            for p in pieces(entry.name, entry.shape, 0):
                theirs[p.name].grad = parameter.grad[p.index].clone()
        engine.step(cfg.optim.lr)
        for optimizer in optimizers:
            optimizer.step()
    for entry in engine.entries():
        found = engine.read(entry.name, "weight")
        for p in pieces(entry.name, entry.shape, 0):
            torch.testing.assert_close(found[p.index], theirs[p.name].detach(), rtol=1e-6, atol=1e-7)


def test_matrices_have_two_bytes_a_parameter_and_embeddings_eight():
    fresh_accelerate()
    cfg = run_of()
    engine, _ = build_trained(cfg, start(cfg), None)
    engine.make_optimizer_state(0)
    for name, parameter in engine.model.named_parameters():
        state = engine.optimizer.state[parameter]
        held = sum(m.values.nbytes + m.absmax.nbytes for kind in KINDS for m in state[kind])
        large = parameter.dim() > 1 and parameter.shape[-2:].numel() >= 4096 and "embed" not in name
        assert held / parameter.numel() == pytest.approx(2 + 8 / BLOCK if large else 8), name


@pytest.mark.parametrize(("ep", "stage"), [(2, 1), (2, 2), (2, 3), pytest.param(1, 1, marks=pytest.mark.grid)])
def test_two_ranks_are_one_process(two_ranks, ep, stage):
    expected = train_steps(run_of(), 4)
    found = two_ranks.run(train_steps, run_of(2, ep=ep, stage=stage), 4)
    for per_rank in found:
        assert per_rank["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    for kind in ("weights", *KINDS):
        assert difference(found, expected, kind, floor=1e-5)[0] < 0.02, kind


def test_a_resumed_run_is_an_uninterrupted_one_to_the_bit(tmp_path):
    first = train_steps(run_of(), 3, save=str(tmp_path / "a"))
    resumed = train_steps(run_of(), 2, source=first["saved"], first=3)
    uninterrupted = train_steps(run_of(), 5)
    assert resumed["losses"] == uninterrupted["losses"][3:]
    for kind in ("weights", *KINDS):
        assert difference([resumed], uninterrupted, kind)[0] == 0, kind


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_moves_to_ranks_and_back_but_for_blocks_that_they_cut(two_ranks, tmp_path, stage):
    first = train_steps(run_of(), 3, save=str(tmp_path / "a"))
    moved = two_ranks.run(_saved, run_of(2, ep=2, stage=stage), first["saved"], str(tmp_path / "b"))[0]
    before, after = (_moments(path) for path in (first["saved"], moved))
    assert before.keys() == after.keys()
    apart = sum(int((before[name] != after[name]).sum()) for name in before)
    assert apart <= 2 * BLOCK * 20, "of each of some twenty parameters, of two moments each, one block at most"
    for name, values in before.items():
        torch.testing.assert_close(after[name], values, rtol=0, atol=0.02 * float(values.abs().max()), msg=name)


def _moments(checkpoint: str) -> dict[str, torch.Tensor]:
    files = (Path(checkpoint) / "trainer").glob("optimizer*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _saved(cfg, source: str, save: str) -> str:
    return train_steps(cfg, 0, source=source, first=3, save=save)["saved"]


def test_blocks_are_counted_from_the_parameters_first_element_however_it_is_cut():
    generator = torch.Generator().manual_seed(2)
    start_values, gradients = torch.randn(8192, generator=generator), torch.randn(3, 8192, generator=generator)

    def stepped(cuts: list[int]) -> torch.Tensor:
        ends = []
        for begin, end in pairwise(cuts):
            weight = torch.nn.Parameter(torch.cat([torch.zeros(5), start_values[begin:end]]))
            optimizer = AdamW8bit([{"params": [weight]}], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
            optimizer.share_of = lambda _, b=begin, n=end - begin: Share([Piece((64, 128), b, 5, n)], None)
            for gradient in gradients:
                weight.grad = torch.cat([torch.zeros(5), gradient[begin:end]])
                optimizer.step()
            assert not weight[:5].any(), "what no parameter has is left alone"
            ends.append(weight.detach()[5:])
        return torch.cat(ends)

    whole, cut = stepped([0, 8192]), stepped([0, 1000, 5000, 8192])
    crossed = torch.zeros(8192, dtype=torch.bool)
    for at in (1000, 5000):
        crossed[at // BLOCK * BLOCK : (at // BLOCK + 1) * BLOCK] = True
    assert torch.equal(whole[~crossed], cut[~crossed])
    torch.testing.assert_close(whole[crossed], cut[crossed], atol=1e-3, rtol=0)


def test_a_run_without_bitsandbytes_is_refused_before_its_text_is_read(make_config, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert main(["train", str(make_config("run")), "optim.name=adamw_8bit"]) == 2
    said = capsys.readouterr().err
    assert "optim.name=adamw_8bit needs the package bitsandbytes" in said
    assert "moe_llm[quantize]" in said
    assert not (tmp_path / "run" / "tokenizer").exists()

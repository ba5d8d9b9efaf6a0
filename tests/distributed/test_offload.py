"""Optimizer tensors in host memory: the same numbers, whole skipped steps, and checkpoints of any layout."""

import mmap
import os
import re
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from support.ci import dear
from support.training import config, difference, rows, train_steps

from moe_llm.config.optim import OPTIMIZERS
from moe_llm.distributed import deepspeed as contract
from moe_llm.distributed.mapped_state import check_directory
from moe_llm.errors import UserError
from moe_llm.train.run import train

STEPS = 6
MICRO = 2
OFFLOAD = {"offload_optimizer": "cpu"}


@pytest.fixture(scope="module")
def expected() -> dict:
    return train_steps(config(MICRO * 2, 2, 1, optimizer="adamw"), STEPS)


def offloaded(stage: int, ep: int, **more):
    return config(MICRO, 2, 2, ep=ep, stage=stage, optimizer="adamw", parallel=OFFLOAD, **more)


@pytest.mark.parametrize(("stage", "ep"), dear([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)], (1, 2), (3, 2)))
def test_offload_changes_no_number(two_ranks, expected, stage, ep):
    found = two_ranks.run(train_steps, offloaded(stage, ep), STEPS)
    worst, where = difference(found, expected, "gradients")
    assert worst < 1e-5, where
    for per_rank in found:
        assert per_rank["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert per_rank["norms"] == pytest.approx(expected["norms"], rel=1e-3)
        for norms, reference in zip(per_rank["expert_norms"], expected["expert_norms"], strict=True):
            assert norms == pytest.approx(reference, rel=1e-4)


@pytest.mark.grid
def test_offload_engages_deepspeed_in_one_process(expected):
    from support.ranks import Ranks

    alone = Ranks(1)  # a process of its own, since DeepSpeed leaves its group and accelerate's state behind
    try:
        [found] = alone.run(train_steps, config(MICRO * 2, 2, 1, optimizer="adamw", parallel=OFFLOAD), STEPS)
    finally:
        alone.close()
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)


@pytest.mark.parametrize("stage", dear([1, 2, 3], 2))
def test_bf16_is_the_same_with_and_without_offload(two_ranks, stage):
    precision = {"precision": "bf16"}
    kept = two_ranks.run(train_steps, config(MICRO, 2, 2, ep=2, stage=stage, optimizer="adamw", train=precision), STEPS)
    found = two_ranks.run(train_steps, offloaded(stage, 2, train=precision), STEPS)
    assert found[0]["losses"] == pytest.approx(kept[0]["losses"], rel=2e-3)


def in_files(directory: Path) -> dict[str, str]:
    return {"offload_optimizer": "nvme", "nvme_path": str(directory)}


def files_of(engine, directory: str) -> tuple[int, int, list[str]]:
    """Bytes of a rank's files without names that are mapped, those of its optimizer's fp32 weights and moments, and the names
    in the directory."""
    pieces = [piece.numel() for piece in contract.flat_parameters(engine.engine.optimizer)]
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if f" {directory}/" in line]
    spans = [line[0].split("-") for line in maps if line[-1] == "(deleted)"]
    return sum(int(end, 16) - int(begin, 16) for begin, end in spans), 4 * 3 * sum(pieces), os.listdir(directory)


@pytest.mark.parametrize(
    ("stage", "ep", "precision"),
    dear(
        [(stage, ep, p) for stage in (1, 2, 3) for ep in (1, 2) for p in ("fp32", "bf16")],
        (1, 2, "bf16"),
        (3, 2, "fp32"),
    ),
)
def test_files_hold_the_optimizer_and_change_no_bit(two_ranks, tmp_path, stage, ep, precision):
    train = {"precision": precision}
    kept = two_ranks.run(train_steps, offloaded(stage, ep, train=train), 3)
    mapped = config(MICRO, 2, 2, ep=ep, stage=stage, optimizer="adamw", train=train, parallel=in_files(tmp_path))
    look = partial(files_of, directory=str(tmp_path))
    for reference, found in zip(kept, two_ranks.run(partial(train_steps, see=look), mapped, 3), strict=True):
        held, needed, names = found["seen"]
        assert found["losses"] == reference["losses"]
        assert found["norms"] == reference["norms"]
        assert needed <= held < needed + 100 * mmap.PAGESIZE, "masters and moments are not all in files"
        assert not names, "files are left where a run is killed"


@pytest.mark.parametrize("device", ["cpu", "nvme"])
@pytest.mark.parametrize("name", dear(["adamw_8bit", "lion", "sgd", "schedule_free"], "adamw_8bit"))
def test_every_optimizer_that_offloads_computes_what_it_does_without(two_ranks, tmp_path, name, device):
    assert OPTIMIZERS[name].offload
    parallel = OFFLOAD if device == "cpu" else in_files(tmp_path)
    kept, found = (
        two_ranks.run(train_steps, config(MICRO, 2, 2, ep=2, stage=2, optimizer=name, parallel=where), 4)[0]
        for where in ({}, parallel)
    )
    assert found["losses"] == pytest.approx(kept["losses"], rel=1e-6)


def test_a_directory_without_room_is_refused(two_ranks, tmp_path):
    refused = two_ranks.run(built_with_little_room, config(MICRO, 2, 2, optimizer="adamw", parallel=in_files(tmp_path)))
    for sentence in refused:
        assert re.fullmatch(r"parallel\.nvme_path='.*' cannot hold .* GiB more of the optimizer \(.*\): .*", sentence)


def built_with_little_room(cfg) -> str:
    """On the second rank alone the files may have some 4 KiB."""
    from support.ranks import fresh_accelerate

    from moe_llm.distributed.runtime import start
    from moe_llm.errors import UserError
    from moe_llm.train.build import build_trained

    fresh_accelerate()
    runtime = start(cfg)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if runtime.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        build_trained(cfg, runtime, None)
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "nobody was refused"


@pytest.mark.parametrize(
    ("path", "words"), [("missing", "does not exist"), ("file", "is no directory"), ("locked", "Permission denied")]
)
def test_a_directory_that_cannot_be_used_is_refused_before_any_work(tmp_path, monkeypatch, path, words):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("locked"))  # root may write everywhere
    with pytest.raises(
        UserError, match=f"parallel.nvme_path='.*{path}' {words}: name a directory on a fast local disk"
    ):
        train(config(MICRO, 2, 1, run={"dir": str(tmp_path / "run")}, parallel=in_files(tmp_path / path)))
    assert not (tmp_path / "run").exists()


def test_a_system_that_reserves_no_room_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    with pytest.raises(UserError, match="needs a system that reserves room in files, as Linux does: use cpu"):
        check_directory(str(tmp_path))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("device", dear(["cpu", "nvme"], "cpu"))
def test_a_run_moves_between_offload_and_another_layout(two_ranks, expected, tmp_path, stage, device):
    half = STEPS // 2
    parallel = OFFLOAD if device == "cpu" else in_files(tmp_path)
    layout = config(MICRO, 2, 2, ep=2, stage=stage, optimizer="adamw", parallel=parallel)
    begun = two_ranks.run(partial(train_steps, save=str(tmp_path / "offloaded")), layout, half)[0]
    alone = config(MICRO * 2, 2, 1, optimizer="adamw")
    ended = train_steps(alone, half, source=begun["saved"], first=half)
    assert begun["losses"] + ended["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    saved = train_steps(alone, half, save=str(tmp_path / "alone"))["saved"]
    back = two_ranks.run(partial(train_steps, source=saved, first=half), layout, half)[0]
    assert back["losses"] == pytest.approx(expected["losses"][half:], rel=1e-4)


def step_discarded_between_two(cfg) -> tuple[float, list[float], list[float]]:
    """(gradient's square before a discarded step, weights' sums before and after it, norms of the steps around)."""
    from support.ranks import fresh_accelerate

    from moe_llm.data.packing import model_inputs
    from moe_llm.distributed.runtime import start
    from moe_llm.distributed.step_loss import StepLoss
    from moe_llm.train.build import build_trained

    fresh_accelerate()
    runtime = start(cfg)
    engine, _ = build_trained(cfg, runtime, None)

    def backward(step: int) -> None:
        batches = [rows(step, (j * 2 + runtime.rank) * MICRO, MICRO) for j in range(2)]
        step_loss = StepLoss(cfg.model, runtime, batches)
        for j, batch in enumerate(batches):
            engine.backward(step_loss(engine.forward(**model_inputs(batch))).total, last=j == 1)

    def sums() -> list[float]:
        return [
            engine.read(e.name, k).double().sum().item() for e in engine.entries() for k in ("weight", *engine.kinds)
        ]

    backward(0)
    norms = [engine.step(0.01)]
    backward(1)
    square = runtime.sum(engine.gradient_square().clone()).item()
    before = sums()
    engine.discard()
    after = sums()
    backward(1)
    norms.append(engine.step(0.01))
    return square, norms, [abs(a - b) for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_discarded_step_changes_nothing_and_leaves_nothing_behind(two_ranks, stage):
    for square, norms, changes in two_ranks.run(step_discarded_between_two, offloaded(stage, 2)):
        assert square**0.5 == pytest.approx(norms[1], rel=1e-3), "the guard does not see the gradients"
        assert max(changes) == 0.0
    assert torch.isfinite(torch.tensor(norms)).all()

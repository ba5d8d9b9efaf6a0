"""Saving beside training on real ranks: the two exchange at once, each over a group of its own."""

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import fresh_accelerate
from support.training import config, rows

from moe_llm.checkpoint import safetensors_io
from moe_llm.checkpoint.background import Background
from moe_llm.checkpoint.state import save_checkpoint
from moe_llm.config import dump_config
from moe_llm.data.packing import model_inputs
from moe_llm.distributed.runtime import start
from moe_llm.distributed.side_group import SideGroup
from moe_llm.distributed.step_loss import StepLoss
from moe_llm.train.build import build_trained
from moe_llm.train.trainer import learning_rate

EXCHANGES = 200


def exchange_in_two_threads() -> tuple[list, list]:
    fresh_accelerate()
    runtime = start(config(2, 1, 2, ep=2))
    side, gathered = SideGroup(runtime), []

    def talk():
        for i in range(EXCHANGES):
            gathered.append(list(side.gather((side.rank, i))))

    thread = threading.Thread(target=talk)
    thread.start()
    sums = [runtime.sum(torch.tensor([float(i + runtime.rank)])).item() for i in range(EXCHANGES)]
    thread.join()
    dist.barrier()
    return sums, gathered


def test_two_threads_of_each_rank_exchange_without_meeting(two_ranks):
    for sums, gathered in two_ranks.run(exchange_in_two_threads):
        assert sums == [2.0 * i + 1 for i in range(EXCHANGES)]
        assert gathered == [[(0, i), (1, i)] for i in range(EXCHANGES)]


def train_beside_a_save(cfg, root: Path) -> tuple[list[str], bool]:
    """Two steps; a save at once and one in the background, which the disk holds up until three more are done."""
    fresh_accelerate()
    runtime = start(cfg)
    engine, _ = build_trained(cfg, runtime, None)

    def step(number: int) -> None:
        batch = rows(number, runtime.rank * 2, 2)
        step_loss = StepLoss(cfg.model, runtime, [batch])
        engine.backward(step_loss(engine.forward(**model_inputs(batch))).total, last=True)
        engine.step(learning_rate(cfg, number))

    def save(name: str, background: Background | None) -> Path:
        return save_checkpoint(
            root / name,
            engine,
            step=2,
            trainer_state={"step": 2},
            model_config=cfg.model,
            run_config_text=dump_config(cfg),
            tokenizer=None,
            dtype=cfg.checkpoint.dtype,
            background=background,
        )

    step(0)
    step(1)
    at_once = save("sync", None)
    disk, true_write = threading.Event(), safetensors_io.ShardWriter.write

    def write(writer, name, tensor):
        assert disk.wait(60)
        true_write(writer, name, tensor)

    safetensors_io.ShardWriter.write = write
    try:
        with Background(SideGroup(runtime), print) as background:
            path = save("async", background)
            for number in (2, 3, 4):
                step(number)
            early = path.exists()
            disk.set()
    finally:
        safetensors_io.ShardWriter.write = true_write
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    different = [name for name in names if (path / name).read_bytes() != (at_once / name).read_bytes()]
    assert len(names) == sum(p.is_file() for p in at_once.rglob("*")) > 5
    return different, early


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_steps_go_on_beside_a_save_and_change_nothing_in_it(two_ranks, tmp_path, stage, precision):
    cfg = config(
        2,
        1,
        2,
        ep=2,
        stage=stage,
        optimizer="adamw",
        checkpoint={"async": True, "dtype": precision},
        train={
            "max_steps": 100,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "precision": precision,
            "device": "cpu",
        },
    )
    assert two_ranks.run(train_beside_a_save, cfg, tmp_path) == [([], False)] * 2

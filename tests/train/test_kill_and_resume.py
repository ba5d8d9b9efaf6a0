"""Killed at any moment and started again, a run is the run that it would have been."""

import os
import random
import signal
import time

import pytest
from support import runs

from moe_llm.cli import main

STEPS = 24
KILLED = {
    "train": {"max_steps": STEPS, "micro_batch_size": 2, "global_batch_size": 4},
    "checkpoint": {"every_steps": 3, "keep_last": 2},
    "evaluate": {"every_steps": 4, "max_blocks": 2},
}


def kill_between(command, run_dir, first: int, last: int, draw: random.Random, ranks: int = 1) -> None:
    """Start a run and kill -9 all of it at a random moment after a random step."""
    with runs.started(command) as process:
        step = draw.randint(first, last)
        runs.wait_for(lambda: runs.steps_written(run_dir) >= step, process)
        time.sleep(draw.uniform(0, 0.05))
        if ranks > 1:
            assert len(runs.rank_processes(process.pid)) == ranks
        for pid in [*runs.descendants(process.pid), process.pid]:
            os.kill(pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert runs.steps_written(run_dir) < STEPS, "it was not killed in time"


def test_one_process_killed_twice_equals_uninterrupted_to_the_last_bit(make_config, tmp_path):
    config, draw = make_config("killed", **KILLED), random.Random(11)
    run_dir = tmp_path / "killed"
    kill_between(runs.single(config), run_dir, 4, 8, draw)
    kill_between(runs.single(config), run_dir, 13, 16, draw)
    with (run_dir / "metrics.jsonl").open("a") as file:  # as if the kill had come in the middle of a line
        file.write('{"step": 23, "tokens": 2')
    assert main(["train", str(config)]) == 0
    assert main(["train", str(make_config("straight", **KILLED))]) == 0
    found, expected = runs.timeless(run_dir), runs.timeless(tmp_path / "straight")
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert found == expected
    weights = [d / f"checkpoints/step-{STEPS:08d}/model.safetensors" for d in (run_dir, tmp_path / "straight")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.grid
def test_two_ranks_killed_under_the_launcher_go_on_as_one_process_that_was_not(make_config, tmp_path):
    """The reference takes the ranks' micro-batches together, so this is more than resuming."""
    # rounding differs between the two, and a larger eps keeps Adam from blowing that up
    changes = {**KILLED, "optim": {"lr": 3e-3, "eps": 1e-5}}
    config = make_config("killed", parallel={"expert_parallel_size": 2}, **changes)
    run_dir, draw = tmp_path / "killed", random.Random(12)
    kill_between(runs.launched(config), run_dir, 4, 8, draw, ranks=2)
    # the layout may be another one; the sample is made by one rank, although ZeRO-3 had spread the weights
    done = runs.finish(runs.launched(config, "parallel.zero_stage=3", "evaluate.sample_prompt=abc"))
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert "FutureWarning" not in done.stderr
    assert done.stdout.count("--- a sample, from 'abc' ---\nabc") == 1

    whole = {**changes, "train": {**KILLED["train"], "micro_batch_size": 4}}
    assert main(["train", str(make_config("straight", **whole))]) == 0
    found, expected = runs.records(run_dir), runs.records(tmp_path / "straight")
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found, expected, strict=True):
        assert set(ours) == set(theirs)
        for key in {"loss", "lm_loss", "aux_loss", "z_loss", "val_loss"} & set(ours):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (key, ours["step"])
        assert ours["moe"]["tokens_per_expert"] == theirs["moe"]["tokens_per_expert"]
        assert ours["lr"] == theirs["lr"]

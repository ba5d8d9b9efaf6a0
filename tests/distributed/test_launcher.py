"""What launchers say in the environment is followed, reported or refused, and never dropped in silence."""

import sys

import pytest
from support import runs
from support.training import config

from moe_llm import cli
from moe_llm.distributed import launcher
from moe_llm.distributed.launcher import check_launcher, check_local_rank
from moe_llm.errors import UserError


@pytest.fixture
def environment(monkeypatch):
    """Nothing of a launcher's, until a test sets it; `words` and `before` are the launcher's own."""
    for name in list(launcher.os.environ):
        if name.startswith(("ACCELERATE_", "MASTER_", "SLURM_", "OMPI_", "PMI_")) or name.endswith(
            ("RANK", "WORLD_SIZE")
        ):
            monkeypatch.delenv(name)

    def set_up(words: list[str] = [], before: list[str] = [], **variables: str) -> None:  # noqa: B006
        shown = {"cmdline": words, "environ": before}
        monkeypatch.setattr(launcher, "_parent", lambda what: shown[what])
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_up


def told(**sections) -> list[str]:
    said: list[str] = []
    check_launcher(config(1, 1, 1, **sections), said.append)
    return said


BF16 = {"train": {"precision": "bf16"}}
ONE = {"ACCELERATE_MIXED_PRECISION": "no"}


def test_one_process_by_hand_or_by_accelerate_is_left_alone(environment):
    environment()
    assert told() == []
    environment(words=["accelerate", "launch", "--num_processes", "1"], **ONE)
    assert told() == []
    environment(words=["accelerate", "launch"], before=["MASTER_ADDR=host"], MASTER_ADDR="host", **ONE)
    assert told() == []


@pytest.mark.parametrize(
    ("words", "before", "variables", "why"),
    [
        ([], [], {**ONE, "MASTER_ADDR": "127.0.0.1"}, "asked for several processes and has started one"),
        (["--num-processes=2"], ["MASTER_ADDR=h"], {**ONE, "MASTER_ADDR": "h"}, "asked for several processes"),
        (["--num_processes", "4"], ["MASTER_ADDR=h"], {**ONE, "MASTER_ADDR": "h"}, "asked for several processes"),
        ([], [], {"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2 processes"),
        ([], [], {"SLURM_STEP_NUM_TASKS": "8"}, "srun has started 8 processes"),
        ([], [], {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "asks for FSDP"),
        ([], [], {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "asks for dynamo_backend=inductor"),
    ],
)
def test_what_would_not_run_as_asked_is_refused(environment, words, before, variables, why):
    environment(words, before, **variables)
    with pytest.raises(UserError, match=why):
        told()


def test_slurm_with_torchrun_is_no_mistake(environment):
    environment(SLURM_STEP_NUM_TASKS="2", WORLD_SIZE="16")
    assert told() == []


@pytest.mark.parametrize(
    ("asked", "words", "sections", "count"),
    [
        ("fp16", [], BF16, 1),
        ("bf16", [], BF16, 0),
        ("bf16", [], {}, 1),
        ("no", [], BF16, 0),  # what accelerate says where no one has asked
        ("no", ["--mixed_precision", "no"], BF16, 1),
        ("no", ["--mixed-precision=no"], {}, 0),
    ],
)
def test_a_precision_that_is_not_the_runs_is_reported(environment, asked, words, sections, count):
    environment(words, ACCELERATE_MIXED_PRECISION=asked)
    said = told(**sections)
    assert len(said) == count
    assert all(f"mixed_precision={asked}" in sentence for sentence in said)


def test_a_zero_stage_that_is_not_the_runs_is_reported(environment):
    environment(WORLD_SIZE="2", ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
    (said,) = told()
    assert "zero_stage=3, and the run has parallel.zero_stage=1" in said
    assert told(parallel={"zero_stage": 3}) == []


def test_the_rank_that_the_deepspeed_launcher_gives_has_to_be_this_ones(monkeypatch):
    check_local_rank(None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_local_rank(1)
    with pytest.raises(UserError, match="LOCAL_RANK=1"):
        check_local_rank(0)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UserError, match="leave it out"):
        check_local_rank(0)


@pytest.mark.grid
@pytest.mark.parametrize(
    "words",
    [
        ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29763"],
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        ["accelerate.commands.accelerate_cli", "launch", "--config_file", "configs/accelerate/cpu_2.yaml"],
    ],
    ids=["deepspeed", "torchrun", "accelerate"],
)
def test_each_launcher_starts_the_same_two_ranks(make_config, tmp_path, words):
    """By the commands of docs/guides/several-ranks.md; all train the same losses."""
    path = make_config(parallel={"expert_parallel_size": 2}, train={"max_steps": 2})
    done = runs.finish([sys.executable, "-m", *words, "scripts/train.py", str(path)], timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 ranks (expert parallel 2, ZeRO-1)" in done.stdout + done.stderr
    first = runs.records(tmp_path / "run")[0]["loss"]
    one = make_config("alone", train={"max_steps": 1})
    assert cli.main(["train", str(one)]) == 0
    assert runs.records(tmp_path / "alone")[0]["loss"] == pytest.approx(first, rel=1e-5)

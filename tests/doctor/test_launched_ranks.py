"""`moe-llm doctor --launch`: the ranks are those that a launcher has started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_llm import cli
from moe_llm.config import load_config
from moe_llm.doctor.launched import LaunchedRanks, take_part
from moe_llm.doctor.ranks import RankError
from moe_llm.doctor.shrink import PARAMETERS, shrink

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")
OVERRIDES = ["train.device=cpu", "parallel.expert_parallel_size=2"]


def torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def rank_and_size() -> tuple[int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def one_raises_and_the_other_waits() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 does not like it")
    dist.barrier()


def main(out: str) -> None:
    """What a launcher starts: rank 0 writes what it has seen to `out`."""
    config = shrink(load_config(QUICKSTART, OVERRIDES), 2, 2, as_wide=True).config
    if os.environ["RANK"] == "1":
        take_part(config)
        return
    with LaunchedRanks(config, 2, timeout=120) as ranks:
        seen = {"ranks": ranks.run(rank_and_size), "alone": ranks.alone(os.environ.get, "RANK")}
        try:
            ranks.run(one_raises_and_the_other_waits)
        except RankError as error:
            seen["error"] = error.message
    seen["afterwards"] = os.environ["RANK"]
    Path(out).write_text(json.dumps(seen))


def test_a_launchers_ranks_answer_and_one_that_raises_is_named_though_another_waits_for_it(tmp_path):
    """Rank 0's process is meanwhile alone, as one process of the examination has to be."""
    torchrun(__file__, str(tmp_path / "seen.json"), cwd=tmp_path)
    assert json.loads((tmp_path / "seen.json").read_text()) == {
        "ranks": [[0, 2], [1, 2]],
        "alone": None,
        "error": "rank 1: ValueError: rank 1 does not like it",
        "afterwards": "0",
    }


@pytest.mark.grid
def test_the_same_report_on_the_launchers_ranks_and_nothing_left_behind(tmp_path):
    done = torchrun(
        "-m", "moe_llm", "doctor", QUICKSTART, *OVERRIDES, "--launch", "--steps", "2", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert report["passed"]
    assert report["layout"].startswith("2 launched ranks (gloo), 2 of them share a set of experts")
    assert "model.hidden_size" not in report["changes"], "the run's own width"
    keys = {check["key"] for check in report["checks"]}
    assert {"reference_lm", "oracle_updates", "gradients", "weights", "export_logits", "resume_ranks_state"} <= keys
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--launch"], "none has started this process"), (["--launch", "--ranks", "4"], "contradicts --launch")],
)
def test_launch_needs_a_launcher_and_its_number_of_ranks(arguments, words, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["doctor", QUICKSTART, *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_on_own_ranks_the_depth_goes_down_and_widths_no_more_than_they_must(path):
    config = load_config(path)
    made = shrink(config, 8, 4, as_wide=True).config
    assert made.model.num_hidden_layers <= 2
    assert made.train.device == config.train.device
    assert made.model.attention_head_dim == config.model.attention_head_dim
    assert (made.model.hidden_size % 64 == 0) == (config.model.hidden_size % 64 == 0)
    assert made.model.num_attention_heads // made.model.kv_heads == (
        config.model.num_attention_heads // config.model.kv_heads
    )
    size = made.model.model_copy(update={"vocab_size": config.model.vocab_size or 1024}).num_params()
    assert size <= PARAMETERS
    if made.model.hidden_size < config.model.hidden_size:
        assert size > PARAMETERS / 10


if __name__ == "__main__":
    main(sys.argv[1])

"""Whole runs in which experts change ranks: the numbers of a static run, moves in the records, and a resume elsewhere."""

import contextlib
import os
import signal

import pytest
from support import runs
from support.ranks import Ranks

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.cli import main


def trained(raw: dict) -> int:
    return main(["train", str(runs.write_yaml(runs.Path(raw["run"]["dir"]).with_suffix(".yaml"), raw))])


def settings(tmp_path, name: str, steps: int, ranks: int, **parallel):
    text = tmp_path / "text.txt"
    return runs.sections(
        text if text.exists() else runs.write_text(text), tmp_path / "cache", tmp_path / name,
        model={**runs.MODEL, "num_local_experts": 8, "router_aux_loss_coef": 0.0, "initializer_range": 0.3},
        train={"max_steps": steps, "micro_batch_size": 4 // ranks},
        parallel={"expert_parallel_size": ranks, **parallel},
        logging={"console": "off", "every_steps": 1}, checkpoint={"every_steps": 4},
    )  # fmt: skip


def test_a_run_with_moving_experts_is_the_static_one_and_resumes_in_one_process(
    tmp_path, two_ranks_of_a_run: Ranks, capsys
):
    dynamic = {"placement": "dynamic", "placement_every_steps": 1}
    assert two_ranks_of_a_run.run(trained, settings(tmp_path, "moving", 4, 2, **dynamic)) == [0, 0]
    assert trained(settings(tmp_path, "still", 4, 1)) == 0
    moving, still = runs.records(tmp_path / "moving"), runs.records(tmp_path / "still")
    assert [r["lm_loss"] for r in moving] == pytest.approx([r["lm_loss"] for r in still], rel=1e-5)
    moves = [r["placement"] for r in moving if "placement" in r]
    assert moves
    assert all(move["busiest_after"] < move["busiest_before"] for move in moves)
    assert main(["report", str(tmp_path / "moving")]) == 0
    page = (tmp_path / "moving/report.html").read_text()
    assert "Experts that moved" in page
    assert f"{moves[0]['busiest_before']:.2f}" in page
    assert main(["plan", str(tmp_path / "moving.yaml"), "model.vocab_size=320", "--gpus", "2", "--gpu-memory", "80GiB",
                 "--loads", str(tmp_path / "moving")]) == 0  # fmt: skip
    assert "where experts have moved" in capsys.readouterr().out
    longer = settings(tmp_path, "moving", 5, 1)
    assert trained(longer) == 0
    assert trained(settings(tmp_path, "still", 5, 1)) == 0
    a, b = (MoEForCausalLM.from_pretrained(tmp_path / n / "checkpoints/latest") for n in ("moving", "still"))
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters()):
        assert (p - q).abs().max() < 2e-3 * q.abs().max(), name


CUT = """
import os, signal
from pathlib import Path
from moe_llm.distributed import placement
from moe_llm.train.callbacks import Callback

class Cut(Callback):
    def __init__(self, mark):
        self.mark = Path(mark)
    def on_setup(self, run):
        exchange, tensors = placement._exchange, []
        def cut(*arguments):
            if run.position.step >= 5 and run.runtime.rank == 1:
                tensors.append(run.position.step)
                if len(tensors) == 3:
                    self.mark.write_text("in the middle")
                    os.kill(os.getpid(), signal.SIGKILL)
            return exchange(*arguments)
        placement._exchange = cut
"""


@pytest.mark.grid
def test_a_rank_killed_while_an_expert_travels_costs_the_steps_since_the_last_checkpoint(tmp_path, monkeypatch):
    """Some of the expert's tensors have arrived and others have not. One process goes on from the checkpoint before, and
    ends where a run does that never had ranks."""
    (tmp_path / "cutting.py").write_text(CUT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(tmp_path)
    mark = tmp_path / "mark"

    def cutting(ranks: int, **parallel) -> dict:
        raw = settings(tmp_path, "moving", 8, ranks, **parallel)
        raw["train"]["callbacks"] = [{"path": "cutting.Cut", "args": {"mark": str(mark)}}]
        return raw

    moving = runs.write_yaml(tmp_path / "moving.yaml", cutting(2, placement="dynamic", placement_every_steps=1))
    with runs.started(runs.launched(moving)) as process:
        runs.wait_for(mark.exists, process)
        for pid in [*runs.descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert 4 <= runs.steps_written(tmp_path / "moving") < 8
    assert any("placement" in record for record in runs.records(tmp_path / "moving"))
    assert [d.name for d in (tmp_path / "moving/checkpoints").glob("step-*")] == ["step-00000004"]
    assert trained(cutting(1)) == 0
    assert trained(settings(tmp_path, "still", 8, 1)) == 0
    found, expected = runs.records(tmp_path / "moving"), runs.records(tmp_path / "still")
    assert [record["step"] for record in found] == list(range(1, 9))
    assert [r["lm_loss"] for r in found] == pytest.approx([r["lm_loss"] for r in expected], rel=1e-4)

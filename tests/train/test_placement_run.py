"""Whole runs in which experts change ranks: the numbers of a static run, moves in the records, and a resume elsewhere."""

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

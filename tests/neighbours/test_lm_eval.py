"""Task evaluation equals `lm_eval --model hf` on the exported checkpoint, on task files of one's own and without a network."""

import json

import pytest
import yaml
from support import runs

from moe_llm.cli import main

pytestmark = pytest.mark.neighbours


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A multiple-choice task and one of perplexity, with their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": "abc def" * (1 + i % 2), "choices": ["gh", "abcdef", "no"], "answer": i % 3} for i in range(7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
    }
    choice = {
        "task": "tiny_choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    text = {
        "task": "tiny_text", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }  # fmt: skip
    for task in (choice, text):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


def test_command_and_run_equal_the_harness_on_the_exported_checkpoint(make_config, tasks, tmp_path, capsys):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    names = ["tiny_choice", "tiny_text"]
    evaluate = {"max_blocks": 4, "tasks": names, "tasks_path": str(tasks)}
    assert (
        main(
            ["train", str(make_config(evaluate=evaluate, train={"max_steps": 2, "device": "cpu", "precision": "fp32"}))]
        )
        == 0
    )
    checkpoint = tmp_path / "run/checkpoints/step-00000002"
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(checkpoint)}, tasks=names, device="cpu", batch_size=1,
        task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0,
    )["results"]  # fmt: skip
    expected = {
        "tiny_choice/acc": theirs["tiny_choice"]["acc,none"],
        "tiny_choice/acc_norm": theirs["tiny_choice"]["acc_norm,none"],
        "tiny_text/byte_perplexity": theirs["tiny_text"]["byte_perplexity,none"],
    }
    capsys.readouterr()
    assert main(["evaluate", str(checkpoint), "--tasks", *names, "--tasks-path", str(tasks), "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    last = runs.records(tmp_path / "run")[-1]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
        assert last[f"val_{name}"] == pytest.approx(value, rel=1e-5), name


def test_a_task_that_is_not_there_is_named_before_training(make_config, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    assert main(["train", str(make_config(evaluate={"tasks": ["no_such_task"]}))]) == 2
    assert "lm_eval knows no task no_such_task" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""Averages of a run's checkpoints, and greedy soups with their decisions."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moe_llm import cli
from moe_llm.checkpoint.folder import complete_checkpoints
from moe_llm.evaluation.evaluate import evaluate_files


def weights(directory):
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("decay", [None, 0.25])
def test_the_last_checkpoints_are_averaged(finished_run, tmp_path, decay):
    recipe = {"merge_method": "checkpoint_average", "run": str(finished_run), "last": 2, "decay": decay}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}))
    assert cli.main(["merge", str(tmp_path / "r.yaml"), str(tmp_path / "out")]) == 0
    newest, before = (weights(path) for path in complete_checkpoints(finished_run / "checkpoints"))
    share = 1 if decay is None else decay
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, (newest[name] + share * before[name]) / (1 + share), rtol=1e-6, atol=1e-7)


def test_more_checkpoints_than_there_are(finished_run, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(f"merge_method: checkpoint_average\nrun: {finished_run}\nlast: 3\n")
    assert cli.main(["merge", str(tmp_path / "r.yaml"), str(tmp_path / "out")]) == 2
    assert "last=3 is more than the 2 complete checkpoints" in capsys.readouterr().err


def test_a_soup_takes_what_helps_and_leaves_the_rest(finished_run, corpus, tmp_path, capsys):
    newest, before = complete_checkpoints(finished_run / "checkpoints")
    spoilt = shutil.copytree(newest, tmp_path / "spoilt")
    shutil.rmtree(spoilt / "trainer")  # whose manifest would tell that the weights have been changed
    state = weights(newest)
    save_file({name: t + 0.5 * torch.randn_like(t) for name, t in state.items()}, spoilt / "model.safetensors")
    names = [str(spoilt), str(before), str(newest)]
    recipe = {"merge_method": "greedy_soup", "models": [{"model": name} for name in names],
              "data": [str(corpus)], "max_blocks": 4}  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["merge", str(tmp_path / "r.yaml"), str(tmp_path / "out")]) == 0
    _, *rows, written = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert written == ["written:", str(tmp_path / "out")]
    alone = {name: evaluate_files(name, [str(corpus)], max_blocks=4)["loss"] for name in names}
    order = sorted(names, key=alone.__getitem__)
    assert [row[0] for row in rows] == order
    assert [float(row[1]) for row in rows] == [round(alone[name], 4) for name in order]
    assert (rows[0][-1], rows[-1][0], rows[-1][-1]) == ("yes", str(spoilt), "no")
    kept = [row[0] for row in rows if row[-1] == "yes"]
    losses = [float(row[2]) for row in rows if row[-1] == "yes"]
    assert losses == sorted(losses, reverse=True)
    found = evaluate_files(tmp_path / "out", [str(corpus)], max_blocks=4)["loss"]
    assert found == pytest.approx(losses[-1], abs=1e-4)
    states = [weights(complete) for complete in (newest, before) if str(complete) in kept]
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, sum(s[name] for s in states) / len(states), rtol=1e-6, atol=1e-7)
    assert not list(tmp_path.glob(".out*"))


def test_a_soup_refuses_before_it_evaluates(finished_run, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moe_llm.merge.soup.evaluate_files", lambda *_, **__: pytest.fail("too late"))
    newest = str(complete_checkpoints(finished_run / "checkpoints")[0])
    for models, data, words in (
        ([{"model": newest}, {"model": "nowhere"}], str(corpus), "model 'nowhere'"),
        ([{"model": newest, "parameters": {"weight": 1.0}}], str(corpus), "models.0.parameters"),
        ([{"model": newest}], "nothing.txt", "error: data=nothing.txt does not exist"),
    ):
        recipe = {"merge_method": "greedy_soup", "models": models, "data": [data]}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        assert cli.main(["merge", str(tmp_path / "r.yaml"), str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""Losses of ensembles, and weights fitted through the command line."""

import json

import pytest
import torch
import yaml
from ensemble_fakes import WORDS, build, checkpoint, log_probs, members, write
from transformers import AutoTokenizer

from moe_llm import cli
from moe_llm.ensemble import scores
from moe_llm.ensemble.causal_lm import load_causal_lm, sampling
from moe_llm.ensemble.evaluate import evaluate
from moe_llm.ensemble.recipe import load_recipe
from moe_llm.evaluation.evaluate import evaluate_files


def run(*argv: str, capsys) -> str:
    assert cli.main(list(argv)) == 0
    return capsys.readouterr().out


def test_one_member_has_the_loss_of_evaluate(models, text):
    """The same contexts: blocks, documents, targets; also with few rows at once, and a part of the blocks."""
    for options in ({}, {"max_blocks": 1}):
        expected = evaluate_files(models["b"], [text], **options)
        found = evaluate(build("linear", members(models["b"])), [text], **options)
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize(
    ("method", "columns", "keys", "formula"),
    [
        ("linear", {"weight": [1, 3]}, {}, lambda a, b: (0.25 * a.exp() + 0.75 * b.exp()).log()),
        ("log_linear", {"weight": [1.5, -0.5]}, {}, lambda a, b: (1.5 * a - 0.5 * b).log_softmax(-1)),
        ("experts", {"role": ["core", "negative"]}, {"lambda": 1}, lambda a, b: (2 * a - b).log_softmax(-1)),
        ("cascade", {"role": ["small", "large"]}, {"threshold": 0.5},
         lambda a, b: torch.where(a.exp().amax(-1, keepdim=True) < 0.5, b, a)),
    ],
)  # fmt: skip
def test_the_loss_is_the_formula(models, tmp_path, method, columns, keys, formula, monkeypatch):
    lines = ["the cat sat on the mat", "dog ran", "a dog and a cat and the mat"]
    for i, line in enumerate(lines):
        (tmp_path / f"{i}.txt").write_text(line)
    tokenizer = AutoTokenizer.from_pretrained(models["a"])
    total, count, asked = 0.0, 0, 0
    for line in lines:
        ids = torch.tensor([[1, *tokenizer(line, add_special_tokens=False).input_ids, 2]])
        a, b = (log_probs(models[name], ids)[0, :-1] for name in "ab")
        total -= float(formula(a, b).gather(1, ids[0, 1:, None]).double().sum())
        count += ids.shape[1] - 1
        asked += int((a.exp().amax(-1) < 0.5).sum())
    ensemble = build(method, members(models["a"], models["b"], **columns), **keys)
    monkeypatch.setattr(scores, "LOGIT_BYTES", 4 * ensemble.main.width * 12)  # a row or two at once
    found = evaluate(ensemble, [str(tmp_path / "*.txt")])
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    small, large = (model.active for model in ensemble.models)
    if method == "cascade":
        assert 0 < asked < count
        assert found["asked"] == asked / count
        assert found["active_parameters"] == pytest.approx(small + large * asked / count)
    else:
        assert found["active_parameters"] == small + large
    for member, name in zip(found["members"], "ab"):
        alone = evaluate(build("linear", members(models[name])), [str(tmp_path / "*.txt")])
        assert member["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert member["active_parameters"] == alone["active_parameters"]


def test_fitted_weights_are_written_and_beat_both_members(models, text, tmp_path, capsys):
    """On the text they were fitted on, where the optimum is no worse than either end."""
    data = ["--data", text]
    for method in ("linear", "log_linear"):
        file = write(tmp_path / f"{method}.yaml", method, members(models["a"], models["b"]), weights="fit")
        out = str(tmp_path / f"{method}.fitted.yaml")
        said = run("ensemble", "fit", file, out, *data, capsys=capsys)
        found = json.loads(run("evaluate", "--ensemble", out, *data, "--json", capsys=capsys))
        assert f"loss {found['loss']:.4f} nats per token" in said
        assert found["loss"] <= min(member["loss"] for member in found["members"]) + 1e-6
        recipe = load_recipe(out)
        assert recipe.to_fit is None
        again = str(tmp_path / f"{method}.again.yaml")
        assert f"loss {found['loss']:.4f} with the numbers given before" in run(
            "ensemble", "fit", out, again, *data, capsys=capsys)  # fmt: skip
        assert load_recipe(again).shares == pytest.approx(recipe.shares, abs=1e-3)
        # the same through `weights: fit` and data in the file itself
        inline = write(tmp_path / "inline.yaml", method, members(models["a"], models["b"]), weights="fit", data=[text])
        shown = json.loads(run("evaluate", "--ensemble", inline, *data, "--json", capsys=capsys))
        assert shown["loss"] == pytest.approx(found["loss"], abs=1e-6)
        assert [m["weight"] for m in shown["members"]] == pytest.approx(recipe.shares, abs=1e-6)


def test_lambda_is_fitted(models, text, tmp_path, capsys):
    roles = members(models["a"], models["b"], models["c"], role=["core", "positive", "negative"])
    file = write(tmp_path / "e.yaml", "experts", roles, **{"lambda": "fit"})
    run("ensemble", "fit", file, str(tmp_path / "out.yaml"), "--data", text, capsys=capsys)
    found = load_recipe(tmp_path / "out.yaml").lambda_

    def loss(strength: float) -> float:
        return evaluate(build("experts", roles, **{"lambda": strength}), [text])["loss"]

    assert loss(found) < min(loss(found - 0.1), loss(found + 0.1), loss(0.0))


def test_a_budget_becomes_a_threshold(models, text, tmp_path, capsys):
    roles = members(models["c"], models["b"], role=["small", "large"])
    file = write(tmp_path / "e.yaml", "cascade", roles, budget=0.3)
    out = str(tmp_path / "out.yaml")
    run("ensemble", "fit", file, out, "--data", text, "--max-blocks", "3", capsys=capsys)
    evaluated = ["--data", text, "--max-blocks", "3", "--json"]
    found = json.loads(run("evaluate", "--ensemble", out, *evaluated, capsys=capsys))
    assert 0.2 < found["asked"] <= 0.3
    content = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert "budget" not in content
    again = write(tmp_path / "inline.yaml", "cascade", roles, budget=0.3, data=[text], max_blocks=3)
    shown = json.loads(run("evaluate", "--ensemble", again, *evaluated, capsys=capsys))
    assert shown["asked"] == found["asked"]


def test_the_table_shows_members_and_ensemble(models, text, tmp_path, capsys):
    file = write(tmp_path / "e.yaml", "linear", members(models["a"], models["b"], weight=[1, 3]))
    rows = run("evaluate", "--ensemble", file, "--data", text, capsys=capsys).splitlines()
    assert rows[0].split()[:3] == ["model", "part", "loss"]
    assert [row.split()[0] for row in rows[1:4]] == [models["a"], models["b"], "linear"]
    assert [row.split()[1] for row in rows[1:3]] == ["0.2500", "0.7500"]
    found = evaluate(build("linear", members(models["a"], models["b"], weight=[1, 3])), [text])
    assert rows[3].split()[1:] == [
        f"{found[key]:.4f}" for key in ("loss", "perplexity", "bits_per_byte")
    ] + [f"{found['active_parameters']:,.0f}"]  # fmt: skip


def test_generate_continues_a_prompt(models, tmp_path, capsys):
    file = write(tmp_path / "e.yaml", "linear", members(models["a"], models["b"]))
    argv = ["generate", "--ensemble", file, "--prompt", "the cat", "--max-new-tokens", "5"]
    greedy = [run(*argv, "--temperature", "0", capsys=capsys) for _ in range(2)]
    assert greedy[0] == greedy[1]
    assert greedy[0].startswith("the cat")
    assert len(greedy[0].split()) > 2
    sampled = {run(*argv, "--temperature", "3", "--top-p", "1", "--seed", str(seed), capsys=capsys) for seed in "1234"}
    assert len(sampled) > 1


def test_nothing_but_top_p_limits_what_is_drawn(tmp_path):
    """transformers takes the 50 likeliest tokens alone where it is not told otherwise."""
    words = [*WORDS, *(f"w{i}" for i in range(100))]
    model = load_causal_lm(checkpoint(tmp_path / "flat", words=words))
    model.lm_head.weight.data.mul_(0.01)  # nearly alike: with equal ones a top-k would keep all
    torch.manual_seed(0)
    ids = model.generate(torch.full((2000, 1), 3), max_new_tokens=1, pad_token_id=2, **sampling(1.0, 1.0))
    assert len(ids[:, 1].unique()) == len(words)


def test_a_prompt_without_tokens_is_refused_for_one_checkpoint_too(models, capsys):
    assert cli.main(["generate", models["a"], "--prompt", ""]) == 2
    assert capsys.readouterr().err == "moe-llm: error: the prompt '' has no tokens: give a text to continue\n"

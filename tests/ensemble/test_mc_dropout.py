"""Monte-Carlo dropout: one checkpoint as many members that share its weights, their mean, and how far they disagree."""

import json
import math

import pytest
import torch
import yaml
from ensemble_fakes import build, members

from moe_llm import cli
from moe_llm.ensemble.evaluate import evaluate
from moe_llm.ensemble.fit import fit
from moe_llm.ensemble.processor import generate
from moe_llm.ensemble.recipe import parse_recipe
from moe_llm.ensemble.rules import LinearMixture
from moe_llm.errors import UserError

IDS = torch.tensor([[1, 5, 9, 4, 7, 3]])


def dropout(models, name="a", **keys):
    return build("mc_dropout", members(models[name]), **keys)


@pytest.mark.parametrize("name", ["a", "b"])
def test_passes_share_the_weights_and_differ_in_their_draws(models, name):
    ensemble = dropout(models, name, passes=3, dropout=0.3)
    first, second, _ = (model.model for model in ensemble.models)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    outputs = [model.model(input_ids=IDS).logits for model in ensemble.models]
    assert not torch.allclose(outputs[0], outputs[1])
    again = dropout(models, name, passes=3, dropout=0.3)
    assert torch.equal(again.models[0].model(input_ids=IDS).logits, outputs[0])
    other = dropout(models, name, passes=3, dropout=0.3, seed=1)
    assert not torch.equal(other.models[0].model(input_ids=IDS).logits, outputs[0])


def test_with_little_dropout_the_answer_is_the_models_own(models, text):
    plain = evaluate(build("linear", members(models["a"])), [text])
    little, much = (evaluate(dropout(models, passes=4, dropout=share), [text]) for share in (1e-6, 0.5))
    assert little["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert plain["disagreement"] == pytest.approx(0, abs=1e-6)
    assert little["disagreement"] < 1e-3 < much["disagreement"]
    assert much["active_parameters"] == 4 * plain["active_parameters"]


def test_disagreement_is_the_entropy_beyond_the_mean_one():
    a, b = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.3, 0.6]])
    mixed = 0.25 * a + 0.75 * b

    def entropy(p):
        return -sum(x * math.log(x) for x in p[0].tolist())

    expected = entropy(mixed) - 0.25 * entropy(a) - 0.75 * entropy(b)
    rule = LinearMixture((0.25, 0.75))
    assert rule.disagreement([a.log(), b.log()], mixed.log()).item() == pytest.approx(expected, abs=1e-6)
    assert rule.disagreement([a.log(), a.log()], a.log()).item() == pytest.approx(0, abs=1e-6)


def test_the_distribution_is_the_mean_of_the_passes(models, text):
    ensemble = dropout(models, passes=3, dropout=0.2)
    expected = torch.stack([log_probs_of(model.model) for model in ensemble.models]).logsumexp(0) - math.log(3)
    again = dropout(models, passes=3, dropout=0.2)
    found = again.rule([log_probs_of(model.model) for model in again.models])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def log_probs_of(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits[0].float().log_softmax(-1)


def test_generation_and_the_command_line_tell_the_disagreement(models, text, tmp_path, capsys):
    ensemble = dropout(models, passes=2)
    inputs = ensemble.main.tokenizer("the cat", return_tensors="pt")
    output = generate(ensemble, inputs, max_new_tokens=4, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    file = tmp_path / "mc.yaml"
    recipe = {"method": "mc_dropout", "members": [{"model": models["a"]}], "passes": 2, "dropout": 0.4}
    file.write_text(yaml.safe_dump(recipe))
    assert cli.main(["evaluate", "--ensemble", str(file), "--data", text, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["disagreement"] > 0
    assert cli.main(["generate", "--ensemble", str(file), "--prompt", "the cat", "--max-new-tokens", "3"]) == 0
    assert "the members disagree by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"passes": 1}, "passes=1"), ({"dropout": 0}, "dropout=0"), ({"dropout": 1.0}, "dropout=1.0"),
     ({"members": [{"model": "a"}, {"model": "b"}]}, "members")],
)  # fmt: skip
def test_bad_settings_are_refused(changes, named):
    with pytest.raises(UserError, match=named):
        parse_recipe({"method": "mc_dropout", "members": [{"model": "a"}]} | changes)


def test_there_is_nothing_to_fit(models, text):
    with pytest.raises(UserError, match="method=mc_dropout has nothing to fit"):
        fit(dropout(models, passes=2, dropout=0.3), [text])

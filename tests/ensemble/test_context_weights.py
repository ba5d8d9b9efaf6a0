"""Weights by context: the mixture that the formula says, never worse than constant ones on the text that they are fitted
on, better where sources alternate, and the same in generation as in evaluation."""

import pytest
import torch
import yaml
from ensemble_fakes import build, log_probs, members, write

from moe_llm import cli
from moe_llm.ensemble.context import Contextual, fit_gate, recent_losses
from moe_llm.ensemble.evaluate import evaluate
from moe_llm.ensemble.fit import fit, mixture_weights
from moe_llm.ensemble.processor import generate
from moe_llm.ensemble.recipe import Gate, parse_recipe
from moe_llm.errors import UserError

GATE = {"weight": [[-1.0, 0.5], [0.3, -2.0]], "bias": [0.1, -0.2]}


def losses_of(models: list[str], ids: torch.Tensor) -> torch.Tensor:
    """(positions, models) by transformers alone, of the next token."""
    found = [log_probs(model, ids[None])[0, :-1].gather(1, ids[1:, None])[:, 0] for model in models]
    return -torch.stack(found, 1)


def expected_distribution(models: list[str], ids: torch.Tensor, window: int, gate: dict = GATE) -> torch.Tensor:
    """(V,) log-probabilities of what follows some tokens."""
    features = torch.zeros(len(models), dtype=torch.float64)
    if len(ids) > 1:
        features = losses_of(models, ids)[-window:].double().mean(0)
    features = features - features.mean()
    weights = (torch.tensor(gate["weight"]).double() @ features + torch.tensor(gate["bias"]).double()).softmax(0)
    each = torch.stack([log_probs(model, ids[None])[0, -1].double().exp() for model in models])
    return (weights @ each).log()


def test_a_distribution_is_the_mixture_that_the_recent_losses_ask_for(models):
    pair, ids = [models["a"], models["b"]], torch.tensor([1, 5, 8, 4, 9, 6])
    ensemble = build("contextual", members(*pair), gate=GATE, window=3)
    from moe_llm.ensemble.scores import last_rows, score_rows

    for length in (1, 2, 6):
        scored = score_rows(ensemble, last_rows(ids[None, :length], torch.ones(1, length, dtype=torch.bool)))
        found = ensemble.rule(scored.log_probs, scored.context_NF)[0]
        torch.testing.assert_close(found.double(), expected_distribution(pair, ids[:length], 3), rtol=1e-4, atol=1e-4)


def test_losses_that_count_are_those_of_tokens_before_in_the_same_row():
    ids, mask = torch.tensor([[0, 1, 2, 3], [3, 2, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    parts = [torch.randn(6, 5, generator=torch.Generator().manual_seed(i)).log_softmax(-1) for i in range(2)]
    found = recent_losses(parts, ids, mask, window=2)
    loss = torch.stack([-torch.stack([p[0, 1], p[1, 2], p[2, 3], p[4, 2]]) for p in parts], 1)
    means = [torch.zeros(2), loss[0], loss[:2].mean(0), loss[1:3].mean(0), torch.zeros(2), loss[3]]
    torch.testing.assert_close(found, torch.stack([m - m.mean() for m in means]))


def test_generation_goes_by_the_same_distributions_padded_or_not(models):
    pair = [models["a"], models["b"]]
    ensemble = build("contextual", members(*pair), gate=GATE, window=3)
    prompt = torch.tensor([1, 5, 8])
    padded = torch.tensor([[2, 2, 1, 5, 8], [1, 5, 8, 4, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = generate(ensemble, {"input_ids": padded, "attention_mask": mask}, max_new_tokens=4, do_sample=False,
                     eos_token_id=None, pad_token_id=2)  # fmt: skip
    for _ in range(4):
        prompt = torch.cat([prompt, expected_distribution(pair, prompt, 3).argmax()[None]])
    assert found[0, 5:].tolist() == prompt[3:].tolist()


def alternating(count: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """Two models, of which one is right in stretches of 30 tokens and the other in those between; losses and features."""
    good = (torch.arange(count) // 30 % 2).bool()
    loss = torch.where(torch.stack([good, ~good], 1), 0.2, 2.0)
    before = torch.zeros_like(loss)
    for t in range(1, count):
        before[t] = loss[max(0, t - 8) : t].mean(0)
    return -loss, before - before.mean(1, keepdim=True)


def test_sources_that_alternate_gain_and_what_says_nothing_costs_nothing():
    log_probs_NU, context_NF = alternating()
    weights_U, likelihoods = mixture_weights(log_probs_NU)
    gate, loss = fit_gate(log_probs_NU, context_NF, weights_U, 1e-6)
    assert loss < -likelihoods[-1] - 0.3
    mixed = Contextual(gate, 2).log_weights(context_NF) + log_probs_NU
    assert -mixed.logsumexp(1).mean().item() == pytest.approx(loss, abs=1e-5)
    noise = torch.randn(context_NF.shape, generator=torch.Generator().manual_seed(0))
    for penalty in (1e-6, 10.0):
        assert fit_gate(log_probs_NU, noise, weights_U, penalty)[1] <= -likelihoods[-1] + 1e-9


@pytest.mark.parametrize("features", ["losses", "hidden"])
def test_a_fitted_file_is_no_worse_than_constants_and_evaluates_to_what_the_fit_said(models, text, tmp_path, features):
    pair = members(models["a"], models["b"])
    ensemble = build("contextual", pair, features=features)
    fitted = fit(ensemble, [text])
    constant = fit(build("linear", pair, weights="fit"), [text])
    assert fitted.before == pytest.approx(constant.loss, abs=1e-6)
    assert fitted.loss <= constant.loss + 1e-9
    assert evaluate(ensemble, [text])["loss"] == pytest.approx(fitted.loss, abs=1e-4)
    source = write(tmp_path / "in.yaml", "contextual", pair, features=features)
    assert cli.main(["ensemble", "fit", source, str(tmp_path / "out.yaml"), "--data", text]) == 0
    recipe = parse_recipe(yaml.safe_load((tmp_path / "out.yaml").read_text()))
    assert recipe.gate is not None
    assert recipe.to_fit is None
    assert evaluate(build_from(recipe), [text])["loss"] == pytest.approx(fitted.loss, abs=1e-4)


def build_from(recipe):
    from moe_llm.ensemble.ensemble import Ensemble

    return Ensemble(recipe)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"features": "hidden", "window": 4}, "window=4 has no effect on features=hidden"),
        ({"gate": {"weight": [[1.0]], "bias": [0.0]}}, "are rows of weight and bias for 2 members"),
        ({"gate": {"weight": [[1.0], [1.0, 2.0]], "bias": [0.0, 0.0]}}, "are rows of unequal length"),
        ({"gate": GATE, "data": ["x"]}, "has no effect, for nothing is to be fitted"),
    ],
)
def test_settings_that_do_not_fit_are_refused(keys, words):
    with pytest.raises(UserError) as refused:
        parse_recipe({"method": "contextual", "members": members("a", "b"), **keys})
    assert words in str(refused.value)


def test_one_checkpoint_twice_is_refused(models):
    with pytest.raises(UserError, match="give different checkpoints"):
        build("contextual", members(models["a"], models["a"]), gate=GATE)
    assert Gate.model_validate(GATE).bias == [0.1, -0.2]

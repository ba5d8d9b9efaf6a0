"""Chains of models over their n best outputs, and drafts that are corrupted and restored."""

import itertools
import random

import pytest
from ensemble_fakes import log_probs, members, write
from test_ensemble_requests import GREEDY, continued, generate
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_llm.data.edits import corrupt_text
from moe_llm.ensemble.recipe import parse_recipe
from moe_llm.errors import UserError


def beams(model: str, prompt: str, count: int) -> list[tuple[str, float]]:
    """Outputs and the mean log-probabilities of their tokens, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    rows = AutoModelForCausalLM.from_pretrained(model).generate(
        **inputs, **GREEDY, num_beams=count, num_return_sequences=count, pad_token_id=2
    )
    found = []
    for ids in rows:
        while len(ids) > length + 1 and ids[-1] == ids[-2] == 2:
            ids = ids[:-1]
        said = log_probs(model, ids[None, :-1])[0].gather(1, ids[1:, None])[length - 1 :]
        before = tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
        found.append((tokenizer.decode(ids, skip_special_tokens=True).removeprefix(before), said.mean().item()))
    return found


def test_a_chain_of_best_outputs_feeds_each_model_with_the_one_before(models, tmp_path, capsys):
    steps = members(models["a"], models["b"], template=["{input} and", "the {output} of {input}"])
    out, _ = generate(write(tmp_path / "c.yaml", "chain", steps), capsys)
    first = continued(models["a"], "the cat sat and")
    assert out == continued(models["b"], f"the {first} of the cat sat") + "\n"


def test_the_n_best_are_passed_on_and_the_highest_sum_of_scores_wins(models, tmp_path, capsys):
    steps = members(models["a"], models["c"], template=["{output} the", "{output} and"])
    out, err = generate(write(tmp_path / "c.yaml", "chain", steps, n_best=3), capsys)
    scores: dict[str, float] = {}
    kept: dict[str, float] = {}
    for text, score in beams(models["a"], "the cat sat the", 3):
        kept[text] = max(kept.get(text, -1e9), score)
    for text, score in kept.items():
        for said, own in beams(models["c"], f"{text} and", 3):
            scores[said] = max(scores.get(said, -1e9), score + own)
    best = max(scores, key=scores.get)
    assert out == best + "\n"
    assert f"step 2, {scores[best]:.4f}: {best}" in err
    assert len([line for line in err.splitlines() if "step 2" in line]) == min(3, len(scores))


def test_drafts_are_edited_ever_more_lightly_and_restored(models, tmp_path, capsys):
    keys = {"rounds": 2, "rate": 0.8, "seed": 3, "template": "{draft} for {input}"}
    out, err = generate(write(tmp_path / "e.yaml", "edits", members(models["a"]), **keys), capsys)
    draw, draft, seen = random.Random(3), continued(models["a"], "the cat sat"), []
    for rate in (0.8, 0.4):
        seen.append(draft)
        draft = continued(models["a"], f"{corrupt_text(draft, rate, draw)} for the cat sat")
    assert out == draft + "\n"
    assert [line.split(": ", 2)[2] for line in err.splitlines() if ": draft " in line] == seen


def test_edits_are_as_many_as_asked_for_and_the_same_for_a_seed():
    words = [f"w{i}" for i in range(4000)]
    text = "\n\t".join(" ".join(words[i : i + 10]) for i in range(0, len(words), 10))
    assert corrupt_text(text, 0.0, random.Random(0)) == text
    edited = corrupt_text(text, 0.3, random.Random(1))
    assert edited == corrupt_text(text, 0.3, random.Random(1)) != corrupt_text(text, 0.3, random.Random(2))
    lost = len(set(words) - set(edited.split()))
    assert 0.12 < lost / len(words) < 0.18  # deleted and replaced, half of the edits
    doubled = sum(a == b for a, b in itertools.pairwise(edited.split()))
    assert 0.06 < doubled / len(words) < 0.09
    assert corrupt_text("", 1.0, random.Random(0)) == ""


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"method": "chain", "members": [{"model": "a"}, {"model": "b", "template": "{input}"}]}, "lacks {output}"),
        ({"method": "chain", "members": [{"model": "a", "template": "x"}]}, "lacks {output} and {input}"),
        ({"method": "edits", "members": [{"model": "a"}], "template": "x"}, "lacks {draft}"),
        ({"method": "edits", "members": [{"model": "a"}, {"model": "b"}]}, "members"),
    ],
)
def test_settings_that_do_not_fit_are_refused(recipe, words):
    with pytest.raises(UserError) as refused:
        parse_recipe(recipe)
    assert words in str(refused.value)


def test_a_chain_gives_text_no_probability(models, text, tmp_path, capsys):
    from moe_llm import cli

    file = write(tmp_path / "c.yaml", "chain", members(models["a"]))
    assert cli.main(["evaluate", "--ensemble", file, "--data", text]) == 2
    assert "method=chain writes whole answers" in capsys.readouterr().err

"""Methods on whole answers: a cascade by request, stacking, self-refinement."""

import pytest
from ensemble_fakes import WORDS, Words, log_probs, members, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_llm import cli
from moe_llm.ensemble import requests
from moe_llm.ensemble.models import load_models
from moe_llm.ensemble.recipe import load_recipe, parse_recipe

GREEDY = {"do_sample": False, "max_new_tokens": 6}


def continued(model: str, prompt: str, whole: bool = False) -> str:
    """By transformers alone; `whole`: with the prompt before it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = AutoModelForCausalLM.from_pretrained(model).generate(**inputs, **GREEDY, pad_token_id=2)[0]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text if whole else text.removeprefix(tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True))


def generate(file: str, capsys, *options: str) -> tuple[str, str]:
    argv = ["generate", "--ensemble", file, "--prompt", "the cat sat", "--max-new-tokens", "6", "--temperature", "0"]
    assert cli.main([*argv, *options]) == 0
    return capsys.readouterr()


def test_the_second_model_sees_the_first_ones_answer(models, tmp_path, capsys):
    template = "{input} and {output} on the {mat} dog"
    file = write(tmp_path / "s.yaml", "stacking", members(models["a"], models["b"], role=["second", "first"]),
                 template=template)  # fmt: skip
    first = continued(models["b"], "the cat sat")
    out, err = generate(file, capsys)
    assert out == continued(models["a"], f"the cat sat and {first} on the {{mat}} dog") + "\n"
    assert f"first: {first}" in err


@pytest.mark.parametrize(("rounds", "critic"), [(1, None), (3, "b")])
def test_drafts_are_criticised_and_revised(models, tmp_path, capsys, rounds, critic):
    roles = members(models["a"], role=["writer"]) + (members(models[critic], role=["critic"]) if critic else [])
    file = write(tmp_path / "r.yaml", "self_refine", roles, rounds=rounds, critique="{input} the {draft}",
                 revise="{draft} and {critique} on")  # fmt: skip
    draft, seen = continued(models["a"], "the cat sat"), []
    for _ in range(rounds):
        critique = continued(models[critic or "a"], f"the cat sat the {draft}")
        seen += [draft, critique]
        draft = continued(models["a"], f"{draft} and {critique} on")
    out, err = generate(file, capsys)
    assert out == draft + "\n"
    assert [line.split(": ", 2)[2] for line in err.splitlines() if line.startswith("ensemble: ")] == seen


def test_a_contented_critic_ends_the_rounds(models, tmp_path, capsys):
    critique = continued(models["a"], f"the {continued(models['a'], 'the cat sat')}")
    keys = {"rounds": 5, "critique": "the {draft}", "revise": "{draft} {critique}"}
    file = write(tmp_path / "r.yaml", "self_refine", members(models["a"], role=["writer"]), stop=critique, **keys)
    out, err = generate(file, capsys)
    assert out == continued(models["a"], "the cat sat") + "\n"
    assert err.count("critique ") == 1


def test_chat_prompts_go_through_the_template(models, tmp_path, capsys):
    file = write(tmp_path / "r.yaml", "self_refine", members(models["a"], role=["writer"]), chat=True)
    argv = ["generate", "--ensemble", file, "--prompt", "the cat sat"]
    assert cli.main(argv) == 2
    assert "has no chat template: set chat: false" in capsys.readouterr().err
    [model] = load_models(load_recipe(file).members)
    model.tokenizer.chat_template = "{{ bos_token }} dog {{ messages[0]['content'] }} ran"
    found = requests.answer(model, "the cat sat", GREEDY, chat=True)
    assert model.tokenizer.decode(found.ids_T[: found.prompt]) == "<s> dog the cat sat ran"


def cascade(models, **keys):
    content = {"method": "cascade", "per": "request", "members": members(models["c"], models["b"],
               role=["small", "large"])}  # fmt: skip
    return parse_recipe({**content, **keys})


def test_a_request_goes_to_the_large_model_below_the_threshold(models, tmp_path, capsys):
    recipe = cascade(models, threshold=0.5)
    small, _ = loaded = load_models(recipe.members)
    found = requests.answer(small, "the cat sat", GREEDY)
    predicted = log_probs(models["c"], found.ids_T[None])[0, found.prompt - 1 : -1]
    said = predicted.gather(1, found.ids_T[found.prompt :, None])
    sure = requests.answer_confidence(small, found)
    assert sure == pytest.approx(float(said.mean().exp()), rel=1e-4)
    for threshold, name in ((sure - 0.01, "c"), (sure + 0.01, "b")):
        file = write(tmp_path / f"{name}.yaml", "cascade", members(models["c"], models["b"], role=["small", "large"]),
                     per="request", threshold=threshold)  # fmt: skip
        out, err = generate(file, capsys)
        assert out == continued(models[name], "the cat sat", whole=True) + "\n"
        assert out.startswith("the cat sat ")
        assert f"{models[name]} answers" in err
    assert len(loaded) == 2


def test_a_budget_of_requests_is_kept(models, tmp_path, capsys):
    words = ["the", "cat", "dog", "mat", "ran", "sat", "on", "and"]
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(" ".join(words[(i * k) % 8] for k in range(1, 12)))
    roles = members(models["c"], models["b"], role=["small", "large"])
    file = write(tmp_path / "e.yaml", "cascade", roles, per="request", budget=0.4)
    out = tmp_path / "out.yaml"
    argv = ["ensemble", "fit", file, str(out), "--data", str(tmp_path / "*.txt")]
    assert cli.main(argv) == 0
    assert "of 10 requests" in capsys.readouterr().out
    recipe = load_recipe(out)
    small = load_models(recipe.members)[0]
    options = {"do_sample": False, "max_new_tokens": requests.ANSWER_TOKENS}
    sure = [
        requests.answer_confidence(small, requests.answer(small, (tmp_path / f"{i}.txt").read_text(), options))
        for i in range(10)
    ]
    assert sum(value < recipe.threshold for value in sure) == 4
    inline = write(tmp_path / "inline.yaml", "cascade", roles, per="request", budget=0.4, max_blocks=10,
                   data=[str(tmp_path / "*.txt")])  # fmt: skip
    assert f"threshold {recipe.threshold:.6g}" in generate(inline, capsys)[1]


@pytest.fixture
def short(tmp_path):
    """A model of twelve positions, which were learned, and so end: transformers would look for the embedding of one
    that is not there."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(WORDS), n_positions=12, n_embd=8, n_layer=1, n_head=2, bos_token_id=1,
                        eos_token_id=2)  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.transformer.wte.weight.data[2] = -model.transformer.wte.weight.data[3:].mean(0)  # it does not end early
    model.save_pretrained(tmp_path / "short")
    Words().save(tmp_path / "short")
    return str(tmp_path / "short")


def test_the_text_of_one_model_ends_where_its_positions_do(short, capsys):
    argv = ["generate", short, "--temperature", "0", "--max-new-tokens", "30"]
    assert cli.main([*argv, "--prompt", "the cat " * 7]) == 2
    said = capsys.readouterr().err
    assert said.startswith("moe-llm: error: the prompt has 14 tokens, and ")
    assert said.endswith(" only max_position_embeddings=12 positions: give a shorter prompt\n")
    for words in (2, 12):
        assert cli.main([*argv, "--prompt", " ".join(["cat"] * words)]) == 0
        assert words <= len(capsys.readouterr().out.split()) <= 13  # the last one is not read


@pytest.mark.parametrize("method", ["linear", "cascade", "stacking", "self_refine"])
def test_texts_end_where_the_positions_of_a_model_do(models, short, tmp_path, capsys, method):
    other = models["a"]
    keys = {"linear": {}, "cascade": {"per": "request", "threshold": 0.0}, "stacking": {"template": "{input} {output}"},
            "self_refine": {"critique": "{draft}", "revise": "{draft} {critique}"}}  # fmt: skip
    roles = {"cascade": ["small", "large"], "stacking": ["first", "second"], "self_refine": ["writer", "critic"]}
    columns = {"role": roles[method]} if method in roles else {"weight": [0.9, 0.1]}
    file = write(tmp_path / "e.yaml", method, members(short, other, **columns), **keys[method])
    argv = ["generate", "--ensemble", file, "--temperature", "0", "--max-new-tokens", "30"]
    assert cli.main([*argv, "--prompt", "the cat " * 7]) == 2
    said = "error: the text of 14 tokens is longer than max_position_embeddings=12 of "
    assert said in capsys.readouterr().err
    assert cli.main([*argv, "--prompt", ""]) == 2
    assert "error: the prompt '' has no tokens: give a text to continue" in capsys.readouterr().err
    assert cli.main([*argv, "--prompt", "the cat"]) == (2 if method == "self_refine" else 0)
    out, err = capsys.readouterr()
    if method == "self_refine":  # the writer cannot read its draft and the criticism together
        assert "tokens is longer than max_position_embeddings=12 of " in err
    elif method != "stacking":
        assert len(out.split()) == 13  # the last one is not read

"""Models of different tokenizers in one: each token's row is where the output's tokenizer looks for it."""

import json

import pytest
import torch
from merge_fakes import WORDS, Words, load, make_model, merged, model_list, save
from transformers import AutoTokenizer

from moe_llm.errors import UserError


@pytest.fixture
def pair(tmp_path):
    """Two models; the second has its words in another order, one of its own, and padding rows."""
    vocabularies = [[*WORDS, "mine"], [*reversed(WORDS), "yours"]]
    paths = []
    for i, entries in enumerate(vocabularies):
        model = make_model("llama", i, vocab_size=len(entries) + 3 * i, bos_token_id=1)
        paths.append(save(model, tmp_path / f"m{i}"))
        Words(entries).save(paths[-1])
    return paths, vocabularies, [load(path) for path in paths]


@pytest.mark.parametrize("source", ["union", "base", "other"])
def test_rows_follow_the_tokens(pair, tmp_path, source):
    paths, vocabularies, states = pair
    recipe = {"merge_method": "linear", "models": model_list(*paths, weight=[3, 1]),
              "tokenizer_source": paths[1] if source == "other" else source}  # fmt: skip
    found = merged(recipe, tmp_path / "out")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    extra = {"union": {"mine", "yours"}, "base": {"mine"}, "other": {"yours"}}[source]
    assert set(tokens) == {*WORDS, *extra}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(found[name]) == len(tokens)
        for token, i in tokens.items():
            rows = [s[name][v.index(token)] for s, v in zip(states, vocabularies) if token in v]
            expected = (3 * rows[0] + rows[1]) / 4 if len(rows) == 2 else rows[0]
            torch.testing.assert_close(found[name][i], expected)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"]) == (len(tokens), tokens["<s>"])


def test_padding_and_a_chat_template(pair, tmp_path):
    paths, _, _ = pair
    recipe = {"merge_method": "linear", "models": model_list(*paths, weight=1.0), "chat_template": "{{ messages }}",
              "tokenizer": {"source": "union", "pad_to_multiple_of": 16}}  # fmt: skip
    found = merged(recipe, tmp_path / "out")["model.embed_tokens.weight"]
    assert len(found) == 16
    torch.testing.assert_close(found[13:], found[:13].mean(0).expand(3, -1))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"


def test_vocabularies_that_share_nothing(pair, tmp_path):
    paths, _, _ = pair
    path = save(make_model("llama", vocab_size=3), tmp_path / "other")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"x": 0, "y": 1, "z": 2}, unk_token="x"))
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(path)
    recipe = {"merge_method": "linear", "models": model_list(paths[0], path, weight=1.0), "tokenizer_source": "union"}
    with pytest.raises(UserError, match="share no token"):
        merged(recipe, tmp_path / "out")

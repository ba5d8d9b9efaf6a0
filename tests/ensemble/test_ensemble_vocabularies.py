"""Members whose tokenizers differ: what is shared, what is left out, and the members' caches."""

import pytest
import torch
from ensemble_fakes import TEXT, build, checkpoint, log_probs, members, write
from merge.merge_fakes import WORDS, Words
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from moe_llm import cli
from moe_llm.data import spm
from moe_llm.ensemble.evaluate import evaluate
from moe_llm.ensemble.processor import generate
from moe_llm.ensemble.vocabulary import Translator

LETTERS = ["a", "c", "d", "e", "g", "h", "m", "n", "o", "r", "s", "t", "u"]
FEWER = ["</s>", "<s>", "<unk>", "the", "dog", "ran", *LETTERS]  # cat, mat, sat, on, and are spelt


@pytest.fixture(scope="module")
def permuted(models, tmp_path_factory) -> str:
    """Model b with its words in another order, special ones too."""
    order = torch.randperm(len(WORDS), generator=torch.Generator().manual_seed(0)).tolist()
    folder = tmp_path_factory.mktemp("permuted")
    checkpoint(folder, "mixtral", 2, words=[WORDS[i] for i in order])
    state = load_file(f"{models['b']}/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][order].contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def spelling(tmp_path_factory) -> str:
    return checkpoint(tmp_path_factory.mktemp("spelling"), "llama", 7, words=FEWER)


def run(ensemble, use_cache: bool = True, **options):
    tokenizer = ensemble.main.tokenizer
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    inputs = tokenizer(["the cat sat on", "dog"], return_tensors="pt", padding=True, add_special_tokens=False)
    return generate(ensemble, inputs, use_cache, max_new_tokens=8, min_new_tokens=8, pad_token_id=2, output_scores=True,
                    return_dict_in_generate=True, **options)  # fmt: skip


def test_the_order_of_a_vocabulary_makes_no_difference(models, permuted, text):
    """Generation and loss, with the main model's tokens in one order and the other's in another."""
    plain = build("log_linear", members(models["a"], models["b"], weight=[0.7, 0.6]))
    other = build("log_linear", members(models["a"], permuted, weight=[0.7, 0.6]))
    assert (plain.translators[1], other.translators[1].shared) == (None, len(WORDS))
    torch.testing.assert_close(run(other, num_beams=3).scores[-1], run(plain, num_beams=3).scores[-1])
    assert evaluate(other, [text])["loss"] == pytest.approx(evaluate(plain, [text])["loss"], abs=1e-5)
    [entry] = other.vocabularies()
    assert entry["left_out"] == pytest.approx(0, abs=1e-6)
    assert entry["not_asked"] == pytest.approx(0, abs=1e-6)


def test_shared_tokens_get_the_members_shares_and_others_the_main_ones(tmp_path):
    main, other = tokenizers(tmp_path)
    found = Translator(main, other, 11, len(FEWER) + 2, ("x", "y"))
    assert found.shared == 6  # the, dog, ran, and three special ones
    p, q = torch.randn(3, 11).log_softmax(-1), torch.randn(3, len(FEWER) + 2).log_softmax(-1)
    completed, theirs, ours = found.complete(q, p)
    pairs = [(w, FEWER.index(WORDS[w])) for w in range(11) if WORDS[w] in FEWER]
    inside_q = sum(q[:, j].exp() for _, j in pairs)
    inside_p = sum(p[:, i].exp() for i, _ in pairs)
    torch.testing.assert_close(theirs.exp(), inside_q)
    torch.testing.assert_close(ours.exp(), inside_p)
    torch.testing.assert_close(completed.exp().sum(-1), torch.ones(3))
    for i, j in pairs:
        torch.testing.assert_close(completed[:, i].exp(), q[:, j].exp() / inside_q * inside_p)
    rest = [w for w in range(11) if WORDS[w] not in FEWER]
    assert torch.equal(completed[:, rest], p[:, rest])


def tokenizers(folder):
    for name, words in (("main", WORDS), ("other", FEWER)):
        Words(words).save(folder / name)
    return [PreTrainedTokenizerFast.from_pretrained(folder / name) for name in ("main", "other")]


def test_words_are_spelt_where_the_member_has_them_not(tmp_path):
    main, other = tokenizers(tmp_path)
    ids = torch.tensor([main.convert_tokens_to_ids(words) for words in (["<s>", "the", "cat"], ["</s>", "dog", "ran"])])
    mask = torch.tensor([[True, True, True], [False, True, True]])
    read = Translator(main, other, 11, len(FEWER), ("x", "y")).read(ids, mask)
    rows = [other.convert_ids_to_tokens(row[kept]) for row, kept in zip(read.ids_RU, read.mask_RU)]
    assert rows == [["<s>", "the", "c", "a", "t"], ["dog", "ran"]]
    assert read.ends_RT.tolist() == [[0, 1, 4], [0, 1, 2]]


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"num_beams": 3, "do_sample": True}])
def test_cached_is_uncached_where_rows_grow_unevenly(models, spelling, options):
    ensemble = build("linear", members(models["a"], spelling))
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        found.append(run(ensemble, use_cache, **options))
    assert torch.equal(found[0].sequences, found[1].sequences)
    for one, other in zip(found[0].scores, found[1].scores):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_loss_with_a_spelling_member_is_the_formula(models, spelling, tmp_path):
    (tmp_path / "t.txt").write_text("the cat ran")
    ensemble = build("linear", members(models["a"], spelling, weight=[1, 3]))
    result = evaluate(ensemble, [str(tmp_path / "t.txt")])
    main, other = ensemble.models[0].tokenizer, ensemble.models[1].tokenizer
    ids = main.convert_tokens_to_ids(["<s>", "the", "cat", "ran", "</s>"])
    spelt = other.convert_tokens_to_ids(["<s>", "the", "c", "a", "t", "ran"])
    p = log_probs(models["a"], torch.tensor([ids]))[0, :4]
    q = log_probs(spelling, torch.tensor([spelt]))[0, [0, 1, 4, 5]]
    completed, theirs, ours = ensemble.translators[1].complete(q, p)
    mixture = 0.25 * p.exp() + 0.75 * completed.exp()
    expected = -sum(float(mixture[t, ids[t + 1]].log()) for t in range(4)) / 4
    assert result["loss"] == pytest.approx(expected, abs=1e-5)
    [entry] = result["vocabularies"]
    assert entry["left_out"] == pytest.approx(float((1 - theirs.exp()).mean()), abs=1e-5)
    assert entry["not_asked"] == pytest.approx(float((1 - ours.exp()).mean()), abs=1e-5)


def byte_level(words: list[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *letters, *words])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", bos_token="<|end|>")


def test_bytes_are_compared_where_tokenizers_write_them_differently():
    """Of sentencepiece and of GPT-2's kind: `▁and` is `Ġand`, and `<0xC3>` is `Ã`."""
    model = spm.train_model([TEXT * 20], 280, 10**6, 0.9995, 0)
    pieces = PreTrainedTokenizerFast(tokenizer_object=spm.convert(model), **spm.special_tokens(model))
    own = byte_level(["Ġand", "the", "cat", "ĠÃ©"])
    found = Translator(pieces, own, len(pieces), len(own), ("x", "y"))
    ids = dict(zip(found.main_K.tolist(), found.other_K.tolist()))
    names = {pieces.convert_ids_to_tokens(i): own.convert_ids_to_tokens(j) for i, j in ids.items()}
    assert names["▁and"] == "Ġand"
    assert names["the"] == "the"
    assert names["a"] == "a"
    assert names["<0xC3>"] == "Ã"
    assert names["<0x0A>"] == "Ċ"
    assert "<0x61>" not in names  # the letter a is taken by the letter a
    assert names["</s>"] == "<|end|>"
    assert len(set(ids.values())) == len(ids)
    read = found.read(torch.tensor([pieces("the cat é").input_ids]), torch.ones(1, 99).bool())
    assert own.convert_ids_to_tokens(read.ids_RU[0])[0] == "<|end|>"
    assert own.decode(read.ids_RU[0], skip_special_tokens=True) == " the cat é"


def test_vocabularies_that_share_nothing_are_refused(models, tmp_path, capsys):
    strange = checkpoint(tmp_path / "strange", "llama", 7, words=["<unk>", "<s>", "</s>", "un", "deux"])
    file = write(tmp_path / "e.yaml", "linear", members(models["a"], strange))
    assert cli.main(["generate", "--ensemble", file, "--prompt", "the cat"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("share no token: give models of like tokenizers\n")
    assert err.count("\n") == 1


def test_what_is_left_out_is_said(models, spelling, text, tmp_path, capsys):
    file = write(tmp_path / "e.yaml", "linear", members(models["a"], spelling))
    for argv in (["generate", "--prompt", "the cat", "--max-new-tokens", "3"], ["evaluate", "--data", text]):
        assert cli.main([*argv, "--ensemble", file]) == 0
        err = capsys.readouterr().err
        assert f"shares 6 of the 11 tokens of {models['a']}" in err
        assert "left out, on average: " in err

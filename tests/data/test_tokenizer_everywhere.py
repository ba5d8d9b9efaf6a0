"""All commands read a tokenizer folder alike, its ids may have holes, and copies of it are whole."""

import copy
import json
import shutil

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe_llm.cli import main
from moe_llm.data.cache import DocumentEncoder
from moe_llm.data.chat_template import vocabulary_size
from moe_llm.data.loader import load_evaluation
from moe_llm.data.tokenizer import check_vocab, copy_tokenizer, load_tokenizer, resolve_vocab
from moe_llm.errors import UserError
from moe_llm.merge.vocabulary import load_tokenizer as load_for_merging


@pytest.fixture
def folder(tokenizer, tmp_path):
    return shutil.copytree(tokenizer.name_or_path, tmp_path / "given")


def _settings(folder, **changes):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _with_token_at(folder, index: int) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["<|far|>"] = index
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"].append({"id": index, "content": "<|far|>", **flags})
    file.write_text(json.dumps(content))


def test_merging_reads_a_sentencepiece_folder_as_training_does(folder, make_text):
    (folder / "tokenizer.json").unlink()
    ours, merging = load_tokenizer(folder), load_for_merging(folder)
    texts = [make_text(seed) for seed in range(5)] + ["  two  spaces", "naïve 漢字"]
    assert [merging(text)["input_ids"] for text in texts] == [ours(text)["input_ids"] for text in texts]
    assert merging.get_vocab() == ours.get_vocab()


def test_tokenizer_json_decides_whatever_class_is_named(folder):
    """transformers' LlamaTokenizer would build another pre-tokenizer from the same vocabulary."""
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    _settings(folder, tokenizer_class="LlamaTokenizer")
    texts = ["  two  spaces\n\n\tdef f(x)", "▁ x", "naïve"]
    expected = [plain(text)["input_ids"] for text in texts]
    assert [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for text in texts] != expected
    for loaded in (load_tokenizer(folder), load_for_merging(folder)):
        assert [loaded(text)["input_ids"] for text in texts] == expected


@pytest.mark.parametrize(("index", "width"), [(1000, 2), (70_000, 4)])
def test_ids_with_holes_count_up_to_the_largest(folder, make_config, index, width):
    _with_token_at(folder, index)
    tokenizer = load_tokenizer(folder)
    assert tokenizer("<|far|>")["input_ids"][-1] == index
    assert vocabulary_size(tokenizer) == index + 1 > len(tokenizer)
    assert DocumentEncoder(tokenizer).dtype.itemsize == width
    config = make_config([{"type": "python_stdlib"}], model={"vocab_size": None}, tokenizer={"path": str(folder)})
    assert resolve_vocab(config, tokenizer).model.vocab_size == index + 1
    few = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": len(tokenizer)})})
    with pytest.raises(UserError, match=rf"tokenizer of {index + 1} tokens"):
        check_vocab(few, tokenizer)


def test_rows_that_a_checkpoint_has_beyond_its_tokens_stay(make_config, tokenizer):
    config = make_config([{"type": "python_stdlib"}], model={"vocab_size": 32064}, tokenizer={"path": "x"})
    with pytest.raises(UserError, match=r"use 330, or up to 512"):
        check_vocab(config, tokenizer)
    padded = config.model_copy(update={"model": config.model.model_copy(update={"init_from": "base"})})
    assert resolve_vocab(padded, tokenizer).model.vocab_size == 32064


def test_a_copy_has_named_templates_and_the_sentencepiece_model(folder, tmp_path):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(folder, tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").chat_template == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert (tmp_path / "copy/tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert not (tmp_path / "copy/model.safetensors").exists()


def test_the_column_of_evaluated_text_is_given_or_named_as_the_remedy(tokenizer, tmp_path, make_text):
    rows, plain = tmp_path / "rows.jsonl", tmp_path / "plain.jsonl"
    rows.write_text(json.dumps({"body": make_text(1)}) + "\n")
    plain.write_text(json.dumps({"text": make_text(1)}) + "\n")
    given = load_evaluation(str(rows), tokenizer, sequence_length=16, text_field="body")
    assert given.num_targets == load_evaluation(str(plain), tokenizer, sequence_length=16).num_targets
    with pytest.raises(
        UserError, match=r"^--data: .*rows\.jsonl, line 1 has no column 'text': give --text-field with body$"
    ):
        load_evaluation(str(rows), tokenizer, sequence_length=16)
    with pytest.raises(UserError, match=r"^--text-field=txt is no column of .*: it has body, choose one of them$"):
        load_evaluation(str(rows), tokenizer, sequence_length=16, text_field="txt")
    rows.write_text(json.dumps({"id": 1, "body": make_text(1)}) + "\n")
    with pytest.raises(UserError, match=r" has no column 'text': give --text-field with one of id, body$"):
        load_evaluation(str(rows), tokenizer, sequence_length=16)
    rows.write_text("{}\n")
    with pytest.raises(UserError, match=r" has no column 'text', and no other: give rows with a column of text$"):
        load_evaluation(str(rows), tokenizer, sequence_length=16)


def test_the_command_line_offers_the_remedy(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "--text-field" in capsys.readouterr().out


def test_evaluation_offers_chat_for_rows_of_chat_and_text_for_others(tokenizer, tmp_path, make_text):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": []}) + "\n")
    with pytest.raises(UserError, match=r"no column 'text': give --text-field with messages or evaluate with --chat$"):
        load_evaluation(str(rows), tokenizer, sequence_length=16)
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = "{{ messages }}"
    rows.write_text(json.dumps({"body": make_text(1)}) + "\n")
    with pytest.raises(UserError, match=r"neither messages .* but body: call its columns so, or leave --chat out$"):
        load_evaluation(str(rows), talking, sequence_length=16, chat=True)

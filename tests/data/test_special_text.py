"""Special tokens spelt out in text: told of, or parsed; bos and eos by one rule in every command."""

import json
import logging

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_llm.cli import main
from moe_llm.config import SourceConfig
from moe_llm.data.documents import DocumentEncoder, SpecialText, begins_with_bos, prompt_ids
from moe_llm.data.loader import load_data, load_evaluation
from moe_llm.data.shards import cached_tokens
from moe_llm.data.split import HoldOut
from moe_llm.data.tokenizer import content_hash, load_tokenizer, save_tokenizer
from moe_llm.ensemble.causal_lm import read_prompt
from moe_llm.errors import UserError

RENDERED = "<s>[INST] the router [/INST] sends tokens</s>"


@pytest.fixture
def rendered(tmp_path, make_text):
    def make(text: str = RENDERED) -> str:
        rows = [{"text": text if i % 2 else make_text(i)} for i in range(8)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "rows.jsonl")

    return make


def test_text_of_special_tokens_is_told_of_at_every_start(make_config, tokenizer, rendered, caplog):
    config = make_config([{"type": "files", "path": rendered()}])
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        load_data(config, tokenizer, show_progress=False)
        [record] = [r for r in caplog.records if "parse_special_tokens=true" in r.message]
        assert record.levelno == logging.WARNING
        assert "4 of" in record.message
        assert "'<s>'" in record.message


def test_plain_text_is_not_told_of(make_config, tokenizer, rendered, caplog):
    load_data(make_config([{"type": "files", "path": rendered("a < b, s > c")}]), tokenizer, show_progress=False)
    assert "special token" not in caplog.text


def test_parsed_text_has_the_tokens_once(tokenizer, rendered, tmp_path, caplog):
    source = SourceConfig(type="files", path=rendered())
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def documents(parse: bool) -> list[list[int]]:
        text = cached_tokens(
            source, "s", HoldOut(), tokenizer, cache_dir=str(tmp_path / "c"), parse_special_tokens=parse
        )["train"]
        return [text.tokens_N[a:b].tolist() for a, b in zip(text.starts, text.starts[1:])]

    plain, parsed = documents(False), documents(True)
    assert plain[0] == parsed[0], "text without them stays what it is"
    inner = tokenizer.encode(RENDERED, add_special_tokens=False)
    assert parsed[1] == inner
    assert inner.count(bos) == inner.count(eos) == 1
    assert tokenizer.decode(plain[1][1:-1]) == RENDERED
    assert len(plain[1]) > len(parsed[1])
    assert "special token" not in caplog.text


def test_inspect_parses_likewise_and_tells(finished_run, tmp_path, caplog, capsys):
    """Of a column of its own, too."""
    rows = [{"body": text} for text in ["the router sends tokens"] * 8 + [RENDERED] * 8]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = []
    for option in ([], ["--parse-special-tokens"]):
        caplog.clear()
        command = [
            "inspect",
            str(finished_run / "checkpoints/latest"),
            "--data",
            str(tmp_path / "rows.jsonl"),
            "--json",
        ]
        assert main([*command, "--text-field", "body", "--removal-rows", "0", *option]) == 0
        read.append(json.loads(capsys.readouterr().out)["sources"][0]["tokens"])
        assert ("--parse-special-tokens" in caplog.text) == (not option)
    assert read[1] < read[0]


def test_evaluation_parses_likewise_and_tells(tokenizer, rendered, caplog):
    files = rendered()
    told = load_evaluation(files, tokenizer, sequence_length=64)
    assert "--parse-special-tokens" in caplog.text
    assert (
        load_evaluation(files, tokenizer, sequence_length=64, parse_special_tokens=True).num_targets < told.num_targets
    )


def test_where_there_is_no_text_to_parse_the_key_is_refused(make_config):
    source = {"type": "files", "path": "x", "content": "chat"}
    with pytest.raises(ValueError, match="all are chat"):
        make_config([source], data={"sources": [source], "parse_special_tokens": True})


# One rule of bos and eos: train, evaluate and generate agree


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE whose post-processor puts nothing, with a bos and an eos of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")


@pytest.fixture(params=["sentencepiece", "byte-level"])
def folder(request, tokenizer, byte_level, tmp_path):
    save_tokenizer(tokenizer if request.param == "sentencepiece" else byte_level, tmp_path / "given")
    return tmp_path / "given"


@pytest.mark.parametrize("add_eos", [None, True, False])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_documents_and_prompts_begin_alike_and_documents_alone_end(folder, add_bos, add_eos):
    own = begins_with_bos(load_tokenizer(folder))
    file = folder / "tokenizer_config.json"
    given = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    file.write_text(json.dumps(json.loads(file.read_text()) | {k: v for k, v in given.items() if v is not None}))
    tokenizer = load_tokenizer(folder)
    begins = own if add_bos is None else add_bos
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer.encode("to experts", add_special_tokens=False)
    assert bos not in ids
    assert eos not in ids
    [document] = DocumentEncoder(tokenizer).encode(["to experts"])
    assert document.tolist() == [eos if add_bos is False else bos, *ids, eos]
    prompt = read_prompt(tokenizer, "to experts")["input_ids"][0].tolist()
    assert prompt == ([bos] if begins else []) + ids
    assert read_prompt(tokenizer, tokenizer.bos_token + "to")["input_ids"][0].tolist().count(bos) == 1
    assert read_prompt(tokenizer, "to" + tokenizer.eos_token)["input_ids"][0, -1] == eos


@pytest.mark.parametrize("add_bos", [True, False])
def test_what_add_bos_token_says_goes_with_every_copy(folder, tmp_path, add_bos):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": add_bos}))
    tokenizer = load_tokenizer(folder)
    save_tokenizer(tokenizer, tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert begins_with_bos(again) is add_bos
    assert prompt_ids(again, "to experts") == prompt_ids(tokenizer, "to experts")
    assert content_hash(again) == content_hash(tokenizer)


def test_a_token_beyond_the_rows_is_a_sentence(tokenizer, tmp_path, make_text):
    (tmp_path / "x.txt").write_text(make_text(1))
    last = max(tokenizer.encode(make_text(1)))
    for refused in (
        lambda: read_prompt(tokenizer, make_text(1), rows=last),
        lambda: load_evaluation(str(tmp_path / "x.txt"), tokenizer, sequence_length=16, rows=last),
    ):
        with pytest.raises(UserError, match=rf"with the id {last}, and the model has {last} rows.*resize_embeddings"):
            refused()
    assert read_prompt(tokenizer, make_text(1), rows=last + 1) is not None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<s>[INST] a [/INST] b</s>", True),
        ("a\n<s> b\n", True),
        ("a word</s>\r\nb", True),
        ("r'(?P<s>x)'", False),
        ("<p><s>gone</s> now</p>", False),
    ],
)
def test_elements_of_html_are_told_of_only_at_the_edge_of_a_line(tokenizer, text, told):
    assert bool(SpecialText(tokenizer).within(text)) == told


def test_tokens_of_turns_are_told_of_anywhere(byte_level):
    byte_level.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert SpecialText(byte_level).within("within <|im_end|> a line") == ["<|im_end|>"]

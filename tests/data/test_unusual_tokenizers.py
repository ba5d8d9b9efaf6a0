"""Tokenizers with unusual vocabularies, special tokens and files: the ids that their authors' libraries give, or a refusal
that names the file."""

import base64
import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe_llm.config.load import validate
from moe_llm.data.chat_template import write_template
from moe_llm.data.documents import DocumentEncoder, begin_of, prompt_ids
from moe_llm.data.tokenizer import load_tokenizer, save_tokenizer
from moe_llm.errors import UserError

TEXTS = [
    "hello world",
    " two  spaces",
    "naïve Ω 漢字 😀",
    "def f(x):\n    return x\n",
    "12345 3.14",
    "",
    " ",
    "▁x",
    "a\0b",
]
CORPUS = ["hello world this is a test of naïve text 12345 def f(x): return x"] * 20


def model(folder: Path, **options) -> sentencepiece.SentencePieceProcessor:
    made = io.BytesIO()
    given = {
        "model_type": "bpe", "vocab_size": 70, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=made, **(given | options))
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())


def write(folder: Path, name: str, content) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": True, "vocab_size": 330},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["<|im_end|>", "lo▁wo", "▁▁", "\n\n"], "add_dummy_prefix": False},
        {"user_defined_symbols": ["lo wo", "  "]},  # which sentencepiece never finds
        {"user_defined_symbols": ["lo▁wo"]},
        {"control_symbols": ["<|im_end|>"], "pad_id": 3},
        {"bos_piece": "[BOS]", "eos_piece": "[EOS]", "unk_piece": "[UNK]"},
        {"bos_id": -1},
    ],
    ids=str,
)
def test_a_sentencepiece_model_has_its_own_ids(tmp_path, options):
    theirs, ours = model(tmp_path, **options), load_tokenizer(tmp_path)
    assert [ours.encode(text, add_special_tokens=False) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert ours.eos_token_id == theirs.eos_id()
    assert begin_of(ours) == ([theirs.bos_id()] if theirs.bos_id() >= 0 else [])


@pytest.mark.parametrize("wanted", [True, False])
def test_add_prefix_space_is_obeyed(tmp_path, wanted):
    from sentencepiece import sentencepiece_model_pb2

    model(tmp_path, add_dummy_prefix=not wanted)
    write(tmp_path, "tokenizer_config.json", {"add_prefix_space": wanted})
    proto = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "tokenizer.model").read_bytes())
    proto.normalizer_spec.add_dummy_prefix = wanted
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    ours = load_tokenizer(tmp_path)
    assert [ours.encode(text, add_special_tokens=False) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_additional_special_tokens_are_special(tmp_path, name, key):
    size = model(tmp_path).get_piece_size()
    write(tmp_path, "added_tokens.json", {"<|im_start|>": size, "<|im_end|>": size + 1})
    write(tmp_path, name, {key: ["<|im_start|>", {"content": "<|im_end|>"}, "<|new|>"]})
    ours = load_tokenizer(tmp_path)
    found = {token.content: (number, token.special) for number, token in ours.added_tokens_decoder.items()}
    for at, text in enumerate(("<|im_start|>", "<|im_end|>", "<|new|>")):
        assert found[text] == (size + at, True)
    assert ours.decode([size], skip_special_tokens=True) == ""


def test_a_role_that_is_null_is_none(tmp_path):
    model(tmp_path)
    write(tmp_path, "tokenizer_config.json", {"bos_token": None})
    ours = load_tokenizer(tmp_path)
    assert ours.bos_token is None or begin_of(ours) == [ours.bos_token_id]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("added_tokens.json", {"a": "x"}, r"added_tokens\.json is damaged: 'a' has the id 'x'"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": {}}},
            r"added_tokens_decoder has '5': \{\}: give an id",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder has 'x'"),
        ("tokenizer_config.json", "{bad", r"tokenizer_config\.json is damaged"),
        ("tokenizer.model", " ".join([base64.b64encode(b"a").decode(), "0\n"]), "a vocabulary of tiktoken's"),
        ("tokenizer.model", "version https://git-lfs.github.com/spec/v1\noid x\n", "a pointer of Git LFS"),
        ("tokenizer.model", "", "it holds no vocabulary"),
        ("tokenizer.model", '{"version": "1.0"}', "it is a JSON file, whose folder is to be named"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, words):
    model(tmp_path)
    write(tmp_path, name, content)
    with pytest.raises(UserError, match=words):
        load_tokenizer(tmp_path)


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return backend


def word_piece() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "[SEP]", "hello", "world", "two", "##s", "a"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def unigram() -> Tokenizer:
    vocabulary = [("<unk>", 0.0), ("▁hello", -1.0), ("▁", -2.0), ("a", -3.0), ("</s>", 0.0)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return backend


def framed(backend: Tokenizer, *begin: str, end: str | None = None) -> Tokenizer:
    """With a post-processor that puts special tokens around a text."""
    backend.add_special_tokens([*begin, *([end] if end else [])])
    special = [(token, backend.token_to_id(token)) for token in (*begin, *([end] if end else []))]
    around = [*begin, "$A", *([end] if end else [])]
    backend.post_processor = processors.TemplateProcessing(single=around, pair=[*around, "$B"], special_tokens=special)
    return backend


def flagged() -> Tokenizer:
    backend = byte_level()
    backend.add_tokens(
        [
            AddedToken("<|im_end|>", lstrip=True, rstrip=True, special=True),
            AddedToken("HELLO", normalized=True),
            AddedToken("world", single_word=True),
        ]
    )
    return backend


KINDS = {
    "no bos": (byte_level, {"eos_token": "<|e|>"}, []),
    "bos is eos and pad": (byte_level, {"bos_token": "<|e|>", "eos_token": "<|e|>", "pad_token": "<|e|>"}, []),
    "pad within the vocabulary": (byte_level, {"eos_token": "<|e|>", "pad_token": "a"}, []),
    "bos and eos around": (lambda: framed(byte_level(), "<s>", end="</s>"), {"bos_token": "<s>", "eos_token": "</s>"}, ["<s>"]),
    "a bos that is not named": (lambda: framed(byte_level(), "<b>"), {"eos_token": "<|e|>"}, ["<b>"]),
    "two tokens before": (lambda: framed(byte_level(), "[gMASK]", "<sop>"), {"eos_token": "<|e|>"}, ["[gMASK]", "<sop>"]),
    "WordPiece": (lambda: framed(word_piece(), "[CLS]", end="[SEP]"), {"eos_token": "[SEP]", "unk_token": "[UNK]"}, ["[CLS]"]),
    "Unigram": (unigram, {"eos_token": "</s>", "unk_token": "<unk>"}, []),
    "flags of added tokens": (flagged, {"eos_token": "<|e|>"}, []),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_json_is_read_as_transformers_reads_it(tmp_path, kind):
    make, names, begin = KINDS[kind]
    PreTrainedTokenizerFast(tokenizer_object=make(), **names).save_pretrained(tmp_path / "given")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "given"), load_tokenizer(tmp_path / "given")
    save_tokenizer(ours, tmp_path / "copy")
    copy, begun = load_tokenizer(tmp_path / "copy"), [ours.convert_tokens_to_ids(token) for token in begin]
    for text in [*TEXTS, "HELLO world worlds", "a <|im_end|> b"]:
        ids = theirs.encode(text, add_special_tokens=False)
        for read in (ours, copy):
            assert read.encode(text, add_special_tokens=False) == ids
            assert prompt_ids(read, text) == [*begun, *ids]
        assert theirs(text)["input_ids"][: len(begun) + len(ids)] == [*begun, *ids]
    [document] = DocumentEncoder(ours).encode(["hello"])
    assert document[-1] == ours.eos_token_id
    assert document[0] == (begun[0] if len(begun) == 1 else ours.bos_token_id or ours.eos_token_id)


def test_code_of_the_tokenizers_own_is_refused_with_a_remedy_that_works(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|e|>").save_pretrained(tmp_path)
    said = {"eos_token": "<|e|>"}
    write(tmp_path, "tokenizer_config.json", said | {"auto_map": {"AutoTokenizer": ["x.Y", None]}})
    with pytest.raises(UserError, match=r"auto_map, and no such code is run\): remove auto_map from it"):
        load_tokenizer(tmp_path)
    write(tmp_path, "tokenizer_config.json", said)
    assert load_tokenizer(tmp_path).eos_token == "<|e|>"


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"it holds no tokenizer\.json, tokenizer\.model, tekken\.json or vocab\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("setting", ["auto", "tokenizer"])
def test_named_templates_without_a_default_are_no_reason_for_mixtrals(tmp_path, setting):
    model(tmp_path)
    write(tmp_path, "tokenizer_config.json", {"chat_template": [{"name": "rag", "template": "{{ messages }}"}]})
    raw = {
        "data": {"sources": [{"type": "files", "path": "x", "content": "chat"}], "chat_template": setting},
        "tokenizer": {"path": "x"},
        "train": {"max_steps": 1},
    }
    with pytest.raises(UserError, match="none of the tokenizer's chat templates, rag, is called default: use mixtral"):
        write_template(validate(raw), load_tokenizer(tmp_path), tmp_path)

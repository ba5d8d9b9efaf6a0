"""Corpora that Megatron or datatrove have tokenised are read as they are: same documents, same ids, checked."""

import struct

import numpy as np
import pytest

from moe_llm.config import SourceConfig
from moe_llm.config.load import validate
from moe_llm.data import pieces
from moe_llm.data.kinds import companion
from moe_llm.data.loader import load_data
from moe_llm.data.shards import cached_tokens
from moe_llm.data.sources import check_sources, read_documents
from moe_llm.data.split import HoldOut, find_holdout
from moe_llm.data.token_files import TokenFileEncoder, ids_as_text, text_as_ids
from moe_llm.errors import UserError

FIELD = "data.sources.0"


def write_megatron(path, documents, dtype=np.int32, sentences=1):
    """Each document as up to `sentences` sequences."""
    codes = {np.uint16: 8, np.int32: 4, np.int64: 5}
    parts = [np.array_split(np.array(d, dtype), min(sentences, len(d))) for d in documents]
    lengths = [len(part) for document in parts for part in document]
    begins = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
    edges = np.cumsum([0] + [len(document) for document in parts])
    path.write_bytes(b"".join(part.tobytes() for document in parts for part in document))
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, codes[dtype], len(lengths), len(edges))
    arrays = [np.array(lengths, np.int32), begins.astype(np.int64), edges.astype(np.int64)]
    path.with_suffix(".idx").write_bytes(head + b"".join(a.tobytes() for a in arrays))


def write_datatrove(path, documents, dtype=np.uint16):
    path.write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    ends = np.cumsum([len(d) for d in documents]).astype("<u8")
    companion(path, "datatrove").write_bytes(ends.tobytes())


@pytest.fixture
def texts(make_text):
    return [make_text(seed, 20) for seed in range(60)]


@pytest.fixture
def documents(texts, tokenizer):
    """As Megatron's tools write them: ids and the end of the document."""
    return [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]


FORMATS = {
    "a.bin": lambda path, documents: write_megatron(path, documents, np.uint16),
    "b.bin": lambda path, documents: write_megatron(path, documents, np.int32, sentences=3),
    "c.ds": write_datatrove,
    "d.ds": lambda path, documents: write_datatrove(path, documents, np.uint32),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shard_bytes", [400, 1 << 24])
def test_token_files_give_what_their_text_gives(tmp_path, texts, documents, tokenizer, monkeypatch, name, shard_bytes):
    monkeypatch.setattr(pieces, "SHARD_BYTES", shard_bytes)
    FORMATS[name](tmp_path / name, documents)
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / f"texts/{i:03d}.txt").write_text(text, encoding="utf-8")
    options = {"cache_dir": str(tmp_path / "c"), "num_workers": 1}
    found, expected = (
        cached_tokens(SourceConfig(type="files", path=str(tmp_path / path)), FIELD, HoldOut(), tokenizer, **options)
        for path in (name, "texts/*.txt")
    )
    for part in ("tokens_N", "starts", "sizes"):
        assert (
            np.asarray(getattr(found["train"], part)).tolist() == np.asarray(getattr(expected["train"], part)).tolist()
        )
    assert found["train"].bytes == sum(len(text.encode()) for text in texts)


def config_of(tmp_path, path, tokenizer, **tokenizer_section):
    raw = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"vocab_size": 330},
        "tokenizer": tokenizer_section or {"path": tokenizer.name_or_path},
        "data": {
            "sources": [{"type": "files", "path": str(path)}],
            "cache_dir": str(tmp_path / "cache"),
            "sequence_length": 16,
            "validation_fraction": 0.1,
        },
        "train": {"max_steps": 1},
    }
    return validate(raw)


@pytest.mark.parametrize("name", ["a.bin", "c.ds"])
def test_documents_of_ids_are_held_out_whole_and_once(tmp_path, documents, tokenizer, name):
    FORMATS[name](tmp_path / name, documents)
    data = load_data(config_of(tmp_path, tmp_path / name, tokenizer), tokenizer, show_progress=False)
    texts = [blocks.text for blocks in (data.train.sources[0], data.validation.sources[0])]
    parts = [text.tokens_N[a:b].tolist() for text in texts for a, b in zip(text.starts, text.starts[1:])]
    bos = tokenizer.bos_token_id
    assert sorted(parts) == sorted([bos, *document] for document in documents)
    assert 0 < texts[1].documents < 20


def test_one_document_alone_gives_its_end_to_validation(tmp_path, documents, tokenizer):
    write_datatrove(tmp_path / "one.ds", [np.concatenate(documents)])
    config = config_of(tmp_path, tmp_path / "one.ds", tokenizer)
    _, cut = find_holdout(config).tail
    assert 0.7 * sum(map(len, documents)) < cut < sum(map(len, documents))


def test_ids_beyond_the_vocabulary_are_refused_with_the_remedy(tmp_path, documents, tokenizer):
    write_megatron(tmp_path / "a.bin", [*documents, [5, 330, 7]])
    source = SourceConfig(type="files", path=str(tmp_path / "a.bin"))
    with pytest.raises(UserError, match=r"holds the token 330, and the tokenizer has 330: set tokenizer\.path"):
        cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / "c"))
    assert not list((tmp_path / "c").glob("tokens-*/"))


def test_negative_ids_are_refused(tmp_path, tokenizer):
    write_megatron(tmp_path / "a.bin", [[1, -3, 2]])
    source = SourceConfig(type="files", path=str(tmp_path / "a.bin"))
    with pytest.raises(UserError, match="document 0 holds -3 to 2, which are no token ids"):
        cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / "c"))


@pytest.mark.parametrize("name", ["a.bin", "c.ds"])
@pytest.mark.parametrize("fault", ["missing", "short index", "short tokens", "zeroed index", "other index"])
def test_an_index_that_does_not_fit_is_named(tmp_path, documents, tokenizer, name, fault):
    FORMATS[name](tmp_path / name, documents)
    index = companion(tmp_path / name, "megatron" if name == "a.bin" else "datatrove")
    if fault == "missing":
        index.unlink()
    elif fault == "short index":
        index.write_bytes(index.read_bytes()[:-8])
    elif fault == "short tokens":
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-2])
    elif fault == "zeroed index":
        index.write_bytes(b"\0" * index.stat().st_size)
    else:
        FORMATS[name](tmp_path / f"x{name}", documents[:-1])
        companion(tmp_path / f"x{name}", "megatron" if name == "a.bin" else "datatrove").replace(index)
    source = SourceConfig(
        type="files", path=str(tmp_path / name), format="megatron" if name == "a.bin" else "datatrove"
    )
    with pytest.raises(UserError, match=index.name.replace(".", r"\.")):
        cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / "c"))


def test_another_index_is_another_source(tmp_path, documents, tokenizer):
    from moe_llm.data.sources import fingerprint

    write_datatrove(tmp_path / "c.ds", documents)
    source = SourceConfig(type="files", path=str(tmp_path / "c.ds"))
    before = fingerprint(source, FIELD, tmp_path)
    merged = [documents[0] + documents[1], *documents[2:]]
    write_datatrove(tmp_path / "c.ds", merged)
    assert fingerprint(source, FIELD, tmp_path) != before


def test_tokens_without_their_tokenizer_or_where_text_is_needed_are_refused(tmp_path, documents, tokenizer):
    write_datatrove(tmp_path / "c.ds", documents)
    with pytest.raises(UserError, match=r"data\.sources\.0 holds tokens, .* set tokenizer\.path"):
        check_sources(config_of(tmp_path, tmp_path / "c.ds", tokenizer, train_bytes=5000))
    with pytest.raises(UserError, match="holds tokens, and text is needed here"):
        list(read_documents(SourceConfig(type="files", path=str(tmp_path / "c.ds")), "--data"))
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(UserError, match=r"files of tokens and others, such as .*c\.txt"):
        check_sources(config_of(tmp_path, tmp_path / "c.*", tokenizer))


def test_ids_survive_the_way_through_text():
    ids = np.concatenate([np.arange(70_000), [0x10F7FF - 1, 1_000_000]]).astype(np.uint32)
    assert text_as_ids(ids_as_text(ids)).tolist() == ids.tolist()
    assert len(ids_as_text(ids)) == len(ids)


def test_lengths_of_tokens_add_up_to_those_of_texts(tokenizer, texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(special_tokens=["<s>", "</s>"], vocab_size=400, show_progress=False)
    )
    by_bytes = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    for one in (tokenizer, by_bytes):
        encoder = TokenFileEncoder(one, FIELD, 0, 1, np.dtype(np.uint16))
        for text in texts:
            ids = np.array(one.encode(text, add_special_tokens=False))
            assert encoder.utf8_length(ids_as_text(ids)) == len(text.encode()), text

"""The saved tokenizer: sentencepiece's ids, any text round-trips, and the directory stays what it was."""

import errno
import json
import shutil
import string
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, MixtralConfig

from moe_llm.config import SourceConfig
from moe_llm.data import files, spm
from moe_llm.data.cache import DocumentEncoder
from moe_llm.data.sources import read_documents
from moe_llm.data.tokenizer import build_tokenizer, check_vocab, load_tokenizer, resolve_vocab
from moe_llm.errors import UserError

UNICODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
PIECES = st.lists(
    st.sampled_from(
        [
            "</s>",
            "<s>",
            "<unk>",
            "<0x0A>",
            " ",
            "  ",
            "▁",
            "\ue000",
            "a",
            "b",
            "\n",
            "\t",
            "\r\n",
            "😀",
            "e\u0301",
            "def",
            "\x01",
            "\u200b",
        ]
    ),
    max_size=12,
).map("".join)


def mixtral_model() -> bytes:
    mistral_common = pytest.importorskip("mistral_common")
    return (Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1").read_bytes()


@settings(max_examples=400, deadline=None)
@given(UNICODE | PIECES)
@example("")
@example(" leading, trailing ")
@example("▁ \ue000a \ue000b ▁")
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    bos, *ids, eos = DocumentEncoder(tokenizer).encode([text])[0].tolist()
    assert (bos, eos) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids), "text that looks like a special token stays text in a corpus"


@settings(max_examples=200, deadline=None)
@given(UNICODE.map(lambda t: t.replace("▁", "").replace("\ue000", "")))
def test_ids_are_those_of_sentencepiece(tokenizer, text):
    model = Path(tokenizer.name_or_path, "tokenizer.model").read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert DocumentEncoder(tokenizer).encode([text])[0].tolist() == [1, *processor.encode(text), 2]
    if not any(special in text for special in ("<s>", "</s>", "<unk>")):
        assert tokenizer(text)["input_ids"] == [1, *processor.encode(text)]


def test_a_checkpoint_directory_gives_the_same_tokenizer(tokenizer, tmp_path, make_text):
    tokenizer.save_pretrained(tmp_path)
    MixtralConfig().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = make_text(5) + "  ▁ 😀"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (again.bos_token, again.eos_token, again.unk_token) == ("<s>", "</s>", "<unk>")


def test_a_checkpoint_with_modelling_code_is_read_without_asking(tokenizer, tmp_path, monkeypatch, capfd, make_text):
    """transformers would ask on the terminal whether to run the code, and wait for an answer."""
    tokenizer.save_pretrained(tmp_path)
    config = {"model_type": "moe_llm", "auto_map": {"AutoConfig": "configuration_moe_llm.MoELLMConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_moe_llm.py").write_text("raise SystemExit('run')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert load_tokenizer(tmp_path)(make_text(5))["input_ids"] == tokenizer(make_text(5))["input_ids"]
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_is_code_is_refused(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    said = {**json.loads(file.read_text()), "tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    file.write_text(json.dumps(said))
    (tmp_path / "own.py").write_text("raise SystemExit('run')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_conventions_of_the_trained_model(tokenizer):
    assert len(tokenizer) == 330
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[f"<0x{byte:02X}>"] for byte in range(256)] == list(range(3, 259))
    digits = tokenizer.encode("1234567", add_special_tokens=False)
    assert [tokenizer.decode([i]) for i in digits][-7:] == list("1234567")
    assert not any("1" in piece and len(piece) > 1 and not piece.startswith("<0x") for piece in vocabulary)


def test_mixtrals_own_model_gives_its_own_ids(make_config, tmp_path):
    model = mixtral_model()
    path = tmp_path / "mixtral.model"
    path.write_bytes(model)
    source = {"type": "python_stdlib"}
    config = make_config([source], model={"vocab_size": None}, tokenizer={"path": str(path)})
    tokenizer = build_tokenizer(config, tmp_path / "tokenizer")
    assert resolve_vocab(config, tokenizer).model.vocab_size == 32000
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    documents = list(read_documents(SourceConfig(**source), "s"))[:40] + [" " * n for n in range(60)]
    for text in documents:
        assert tokenizer(text)["input_ids"] == [1, *processor.encode(text)]
        assert tokenizer.decode(processor.encode(text)) == text
    assert (tmp_path / "tokenizer" / "tokenizer.model").read_bytes() == model


def test_training_is_deterministic_and_bounded():
    texts = [f"{a}{b} {b}{a}\t{a} end\n" for a in string.ascii_letters for b in string.ascii_lowercase]
    first = spm.train_model(texts, 330, 10**6, 1.0, seed=0)
    assert spm.train_model(iter(texts), 330, 10**6, 1.0, seed=0) == first
    consumed = []
    spm.train_model((consumed.append(t) or t for t in texts), 320, 500, 1.0, seed=0)
    assert len(consumed) < 80


def test_a_damaged_model_in_the_cache_is_named_and_trained_again(make_config, tmp_path, make_text, caplog, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(make_text(seed) for seed in range(20)), encoding="utf-8")
    config = make_config([{"type": "files", "path": str(tmp_path / "a.txt"), "document": "line"}])
    first = build_tokenizer(config, tmp_path / "first")
    [file] = Path(config.data.cache_dir).glob("tokenizer-*.model")
    whole = file.read_bytes()
    assert build_tokenizer(config, tmp_path / "second").get_vocab() == first.get_vocab()
    assert "trained again" not in caplog.text
    for damaged in (b"", whole[: len(whole) // 2], whole.replace(b"e", b"o", 1)):
        caplog.clear()
        file.write_bytes(damaged)
        shutil.rmtree(tmp_path / "second")
        assert build_tokenizer(config, tmp_path / "second").get_vocab() == first.get_vocab()
        assert f"the tokenizer in {file} is not what was written (SHA-256); it is trained again" in caplog.text
        assert file.read_bytes() == whole
    file.with_suffix(".sha256").unlink()  # as a version before left it, here on a disk that is only read
    monkeypatch.setattr(files, "write_atomically", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    shutil.rmtree(tmp_path / "second")
    assert build_tokenizer(config, tmp_path / "second").get_vocab() == first.get_vocab()


def test_held_out_text_does_not_train_the_tokenizer(make_config, tmp_path):
    (tmp_path / "a.txt").write_text("aaaa bbbb\n" * 500 + "ЖЖЖЖ ЮЮЮЮ\n" * 60)
    source = {"type": "files", "path": str(tmp_path / "a.txt")}
    config = make_config(
        [source],
        model={"vocab_size": 264},
        tokenizer={"character_coverage": 1.0},
        data={"sources": [source], "validation_fraction": 0.2},
    )
    vocabulary = build_tokenizer(config, tmp_path / "tokenizer").get_vocab()
    assert "a" in vocabulary
    assert "Ж" not in vocabulary


def test_every_source_is_sampled_when_there_is_too_much_text(make_config, tmp_path):
    (tmp_path / "a.txt").write_text("aaaa " * 40_000)
    (tmp_path / "b.txt").write_text("bbb\n" * 10_000)
    listed = [
        {"type": "files", "path": str(tmp_path / f"{name}.txt"), "document": document}
        for name, document in (("a", "file"), ("b", "line"))
    ]
    config = make_config(listed, model={"vocab_size": 262}, tokenizer={"train_bytes": 2000, "character_coverage": 1.0})
    vocabulary = build_tokenizer(config, tmp_path / "tokenizer").get_vocab()
    assert {"a", "b"} <= set(vocabulary)


@pytest.mark.parametrize(
    ("vocab_size", "pattern"),
    [
        (5000, r"^model\.vocab_size=5000 is more than .*use at most \d+, "),
        (257, r"^model\.vocab_size=257 has no room for the characters of the text: use at least \d+, "),
    ],
)
def test_vocab_size_that_cannot_be_trained_names_one_that_can(make_config, tmp_path, make_text, vocab_size, pattern):
    (tmp_path / "a.txt").write_text("".join(make_text(i) for i in range(30)))
    source = {"type": "files", "path": str(tmp_path / "a.txt")}
    with pytest.raises(UserError, match=pattern) as caught:
        build_tokenizer(make_config([source], model={"vocab_size": vocab_size}), tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()
    advised = int(str(caught.value).split("use at ")[1].split()[1].rstrip(","))
    tokenizer = build_tokenizer(make_config([source], model={"vocab_size": advised}), tmp_path / "tokenizer")
    assert len(tokenizer) == advised


def test_directory_keeps_its_tokenizer_and_refuses_another(make_config, tmp_path, make_text):
    (tmp_path / "a.txt").write_text("".join(make_text(i) for i in range(100)))
    source = {"type": "files", "path": str(tmp_path / "a.txt")}
    config = make_config([source])
    first = build_tokenizer(config, tmp_path / "tokenizer").backend_tokenizer.to_str()
    (tmp_path / "a.txt").write_text("".join(make_text(i) for i in range(100, 200)))
    assert build_tokenizer(config, tmp_path / "tokenizer").backend_tokenizer.to_str() == first
    with pytest.raises(UserError, match=r"built with vocab_size=330, not 300: choose another run\.dir"):
        build_tokenizer(make_config([source], model={"vocab_size": 300}), tmp_path / "tokenizer")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and holds no tokenizer of a run"):
        build_tokenizer(config, tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_an_existing_directory_is_used_as_it_is(make_config, tokenizer, tmp_path, make_text):
    source = {"type": "python_stdlib"}
    for name in ("tokenizer.json", "tokenizer.model"):  # without the one, from the other
        given_dir = tmp_path / f"given-{name}"
        shutil.copytree(tokenizer.name_or_path, given_dir)
        (given_dir / ({"tokenizer.json", "tokenizer.model"} - {name}).pop()).unlink()
        config = make_config([source], tokenizer={"path": str(given_dir)})
        built = build_tokenizer(config, tmp_path / f"built-{name}")
        assert built(make_text(9))["input_ids"] == tokenizer(make_text(9))["input_ids"]


def test_unusable_tokenizers_are_one_sentence(make_config, tokenizer, tmp_path):
    def attempt(path):
        build_tokenizer(make_config([{"type": "python_stdlib"}], tokenizer={"path": str(path)}), tmp_path / "out")

    with pytest.raises(UserError, match=r"tokenizer\.path=.*missing\.model does not exist"):
        attempt(tmp_path / "missing.model")
    (tmp_path / "bad.model").write_bytes(b"\x00garbage")
    with pytest.raises(UserError, match=r"bad\.model is not a usable sentencepiece model: "):
        attempt(tmp_path / "bad.model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty' cannot be loaded"):
        attempt(tmp_path / "empty")
    endless = tmp_path / "endless"
    shutil.copytree(tokenizer.name_or_path, endless)
    settings_file = endless / "tokenizer_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"eos_token": None}))
    with pytest.raises(UserError, match="has no eos_token"):
        attempt(endless)
    assert not (tmp_path / "out").exists()


def test_vocab_size_must_fit_the_tokenizer(make_config, tokenizer):
    def config(size):
        return make_config([{"type": "python_stdlib"}], model={"vocab_size": size}, tokenizer={"path": "x"})

    for size in (330, 400, 512):
        check_vocab(config(size), tokenizer)
        assert resolve_vocab(config(size), tokenizer).model.vocab_size == size
    for size in (329, 513, 32000):
        with pytest.raises(UserError, match=rf"model\.vocab_size={size} .* 330 tokens: use 330, or up to 512"):
            check_vocab(config(size), tokenizer)
    assert resolve_vocab(config(None), tokenizer).model.vocab_size == 330


def test_a_large_source_is_sampled_from_shards_spread_over_it(tmp_path, make_config, make_text, monkeypatch):
    from moe_llm.data import pieces, rows
    from moe_llm.data import tokenizer as tokenizer_module

    lines = [make_text(seed, 20).replace("\n", " ") for seed in range(2000)]
    (tmp_path / "large.txt").write_text("\n".join(lines), encoding="utf-8")
    config = make_config(
        [{"type": "files", "path": str(tmp_path / "large.txt"), "document": "line"}], tokenizer={"train_bytes": 4000}
    )
    monkeypatch.setattr(pieces, "SHARD_BYTES", 2000)
    monkeypatch.setattr(tokenizer_module, "READ_WHOLE_BYTES", 10_000)
    whole = set(lines)
    read, original = [], rows._lines
    monkeypatch.setattr(rows, "_lines", lambda piece: (read.append(piece), original(piece))[1])
    tokenizer_module.find_holdout(config)  # which reads for itself
    read.clear()
    sample = list(tokenizer_module._sampled(config))
    assert set(sample[:-1]) <= whole, "the last one is cut to the size"
    assert 3000 < sum(len(text.encode()) for text in sample) < 5000
    assert sum(piece.size for piece in read) < 0.4 * sum(map(len, lines))
    begins = [piece.begin for piece in read]
    assert max(begins) > 0.5 * sum(len(line.encode()) for line in lines), "the sample is from all of the source"

"""The text is the user's own where it can be read, and short."""

import json
from pathlib import Path

import pytest

from moe_llm.config import load_config
from moe_llm.data.cache import DocumentEncoder
from moe_llm.data.chat import read_examples
from moe_llm.data.chat_template import MIXTRAL
from moe_llm.data.loader import load_data
from moe_llm.data.sources import named_sources, read_documents
from moe_llm.data.tokenizer import build_tokenizer, load_tokenizer
from moe_llm.doctor import sample
from moe_llm.doctor.shrink import shrink

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"


def prepare(tmp_path, *overrides: str):
    config = load_config(QUICKSTART, overrides)
    tmp_path.mkdir(exist_ok=True)
    return sample.small_data(config, shrink(config, 2, 4).config, tmp_path)


def text_of(config) -> str:
    return "".join(text for field, source in named_sources(config) for text in read_documents(source, field))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(f"zebra {i} crosses the wide river {i * i}" for i in range(3000)))
    return path


def test_every_block_is_met_and_the_last_is_padded(tmp_path):
    config, notes = prepare(tmp_path)
    data = load_data(config, build_tokenizer(config, Path(config.run.dir) / "tokenizer"), show_progress=False)
    samples = config.max_steps * config.train.global_batch_size
    assert config.train.global_batch_size < len(data.train) <= samples
    seen = data.train.rows(0, samples)
    assert not seen.attention_mask_BS.all(), "no padding, so nothing shows that it is left out"
    assert seen.document_ids_BS.amax() > 0, "no block of several documents"
    assert len(data.validation) > 0
    assert notes == []


def test_the_users_own_text_weights_and_held_out_text(tmp_path, corpus):
    other = tmp_path / "held.txt"
    other.write_text("held out words " * 500)
    config, notes = prepare(
        tmp_path,
        f"data.sources=[{{type: files, path: {corpus}, document: line, weight: 3}}, "
        "{type: python_stdlib, weight: 1}]",
        f"data.validation_sources=[{{type: files, path: {other}}}]",
    )
    assert notes == []
    assert "zebra" in text_of(config)
    assert [source.weight for source in config.data.sources] == [3, 1]
    (held_out,) = config.data.validation_sources
    assert "held out words" in next(read_documents(held_out, "x"))


def test_text_out_of_reach_is_replaced_and_says_so(tmp_path):
    config, (note,) = prepare(tmp_path, "data.sources=[{type: files, path: nowhere/*.txt}]")
    assert "nowhere/*.txt matches no file" in note
    assert "import" in text_of(config) or "def" in text_of(config)


def test_a_silent_hub_is_given_up_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "HUB_SECONDS", 0.01)
    _, (note,) = prepare(tmp_path, "data.sources=[{type: hub, path: nobody/nothing}]")
    assert "nobody/nothing gave no text" in note


def test_a_local_tokenizer_is_used_and_a_remote_one_is_not(tmp_path, corpus):
    trained, _ = prepare(tmp_path / "a", f"data.sources=[{{type: files, path: {corpus}}}]")
    own = Path(trained.tokenizer.path)
    config, notes = prepare(tmp_path / "b", f"tokenizer.path={own}", "model.vocab_size=null")
    assert notes == []
    assert config.tokenizer.path == str(own)
    assert config.model.vocab_size == len(load_tokenizer(own))
    config, (note,) = prepare(tmp_path / "c", "tokenizer.path=nobody/nothing")
    assert "tokenizer.path=nobody/nothing is no local path" in note
    assert Path(config.tokenizer.path).is_dir()


def test_pieces_have_very_different_lengths_and_nothing_twice(tmp_path):
    config, _ = prepare(tmp_path)
    encoder = DocumentEncoder(load_tokenizer(config.tokenizer.path))
    texts = ["".join(f"line {i} of {name}\n" for i in range(200)) for name in ("one", "two", "three")]
    pieces = sample.cut(texts, encoder, 40, 500)
    for text in texts:
        mine = [piece for piece in pieces if piece in text]
        assert text.startswith("".join(mine))
    lengths = [len(encoder.encode([piece])[0]) for piece in pieces]
    assert min(lengths) < 30 < 60 < max(lengths)
    assert 500 <= sum(lengths) < 700


@pytest.mark.parametrize("template", ["auto", "long"])
def test_chat_stays_chat(tmp_path, template):
    """Also with a template that is longer than the doctor's blocks."""
    rows = tmp_path / "chat.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"zebra {i} crosses?", "completion": f"the wide river {i * i}"}) + "\n"
            for i in range(2000)
        )
    )
    (tmp_path / "long").write_text("be kind to animals and count them " * 4 + MIXTRAL)
    name = template if template == "auto" else tmp_path / "long"
    config, notes = prepare(
        tmp_path / "small",
        f"data.sources=[{{type: files, path: {rows}, content: chat}}]",
        "data.overlong=drop",
        f"data.chat_template={name}",
    )
    assert ["the chat template alone writes" in note for note in notes] == [True]
    data = load_data(config, build_tokenizer(config, Path(config.run.dir) / "tokenizer"), show_progress=False)
    seen = data.train.rows(0, config.max_steps * config.train.global_batch_size)
    assert 0.05 < (seen.labels_BS != -100).sum() / seen.attention_mask_BS.sum() < 0.7
    assert not seen.attention_mask_BS.all()
    assert len(data.train) > config.train.global_batch_size
    assert "zebra" in "".join(e.plain for f, s in named_sources(config) for e in read_examples(s, f))

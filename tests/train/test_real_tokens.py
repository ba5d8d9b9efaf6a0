"""Tokens that are counted are tokens, not padding: in records, in their rate and in `train.max_tokens`."""

import json

import pytest
from support import runs

from moe_llm.config import Config
from moe_llm.data.loader import load_data
from moe_llm.data.tokenizer import build_tokenizer
from moe_llm.train.run import train


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    lines = runs.write_text(root / "text.txt", 60).read_text(encoding="utf-8").splitlines()
    rows = [{"prompt": line[: 10 + i % 20], "completion": line[:40]} for i, line in enumerate(lines)]
    (root / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def sections(chat, run_dir, **changes):
    raw = runs.sections(chat / "chat.jsonl", chat / "cache", run_dir, **changes)
    raw["data"] |= {"sources": [{"type": "files", "path": str(chat / "chat.jsonl"), "content": "chat"}]}
    raw["data"] |= {"sequence_length": 64}
    return raw


def read_tokens(config: Config, run_dir, steps: int) -> list[int]:
    """Tokens of each step by what the loader hands out."""
    data = load_data(config, build_tokenizer(config, run_dir / "tokenizer"), show_progress=False)
    G = config.train.global_batch_size
    return [data.train.rows(step * G, G).num_tokens for step in range(steps)]


def test_records_count_tokens_without_padding_and_say_how_full_blocks_are(chat, tmp_path):
    config = Config.model_validate(sections(chat, tmp_path / "run"))
    train(config)
    read = read_tokens(config, tmp_path / "run", 6)
    records = runs.records(tmp_path / "run")
    assert [r["tokens"] for r in records] == [sum(read[: i + 1]) for i in range(6)]
    assert [r["fill"] for r in records] == [n / config.tokens_per_step for n in read]
    assert min(r["fill"] for r in records) < 0.95, "there is padding to be left out"


def test_max_tokens_is_reached_by_tokens_and_not_by_padding(chat, tmp_path):
    raw = sections(chat, tmp_path / "run")
    del raw["train"]["max_steps"]
    raw["train"]["max_tokens"] = wanted = 1500
    config = Config.model_validate(raw)
    train(config)
    last = runs.records(tmp_path / "run")[-1]
    assert last["step"] > config.max_steps, "more steps than full blocks would take"
    per_step = last["tokens"] / last["step"]
    assert wanted - per_step <= last["tokens"] <= wanted + 2 * per_step


def test_steps_of_full_blocks_are_as_before(tmp_path):
    raw = runs.sections(tmp_path / "x", tmp_path, tmp_path)
    del raw["train"]["max_steps"]
    raw["train"]["max_tokens"] = 1280
    config = Config.model_validate(raw)
    assert (config.max_steps, config.with_fill(1.0).max_steps, config.with_fill(0.5).max_steps) == (10, 10, 20)
    assert config.with_fill(0.5).model_copy(update={"model": config.model}).max_steps == 20

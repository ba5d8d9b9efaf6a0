"""A run over several sources says of each what was read of it, and reads as many tokens as it was asked to."""

import pytest

from moe_llm.cli import main
from moe_llm.config.load import load_config
from moe_llm.data.loader import load_data
from moe_llm.data.tokenizer import build_tokenizer
from moe_llm.train.metrics import read_metrics
from moe_llm.train.trackers import scalars


def test_a_run_reports_tokens_epochs_and_held_out_loss_of_each_source(make_config, corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text()[2000:9000], encoding="utf-8")
    names = ["data.sources.0", "data.sources.1"]
    config = make_config(
        data={
            "sources": [{"type": "files", "path": str(path), "document": "line"} for path in (corpus, other)],
            "stages": [{"weights": [1, 0]}, {"from_step": 2, "weights": [1, 3]}],
        },
        train={"max_steps": 4},
        evaluate={"every_steps": 2},
        logging={"every_steps": 1},
    )
    assert main(["train", str(config)]) == 0
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [list(record["sources"]) for record in records] == [names] * 4
    assert [record["sources"][names[1]]["tokens"] > 0 for record in records] == [False, False, True, True]
    for record in records:
        assert sum(read["tokens"] for read in record["sources"].values()) == pytest.approx(record["tokens"], rel=0.1)
    measured = records[-1]
    by_source = measured["val_loss_by_source"]
    assert list(by_source) == names
    assert min(by_source.values()) <= measured["val_loss"] <= max(by_source.values())
    assert len(set(by_source.values())) == 2
    told = scalars(measured)
    assert told["data/epochs/data.sources.1"] == measured["sources"][names[1]]["epochs"] > 0
    assert told["eval/loss/data.sources.0"] == by_source[names[0]]
    assert main(["report", str(tmp_path / "run")]) == 0
    page = next((tmp_path / "run").glob("*.html")).read_text(encoding="utf-8")
    assert "What was read" in page
    assert f"{by_source[names[1]]:.4f}" in page


def test_max_tokens_counts_tokens_through_the_stages(make_config, tmp_path, corpus):
    short = tmp_path / "short.txt"
    short.write_text("".join(f"{n} one line\n" for n in range(300)), encoding="utf-8")
    path = make_config(
        data={
            "sources": [{"type": "files", "path": str(p), "document": "line"} for p in (corpus, short)],
            "stages": [{"weights": [1, 0]}, {"from_step": 5, "weights": [0, 1]}],
            "packing": "best_fit",
        },
        train={"max_steps": None, "max_tokens": 9000},
    )
    config = load_config(path)
    tokenizer = build_tokenizer(config, tmp_path / "tokenizer")
    data = load_data(config, tokenizer, show_progress=False)
    steps = config.with_fill(data.train.fill).max_steps
    read = sum(part["tokens"] for part in data.train.progress(steps * config.train.global_batch_size))
    assert 9000 <= read <= 9000 + 2 * config.tokens_per_step

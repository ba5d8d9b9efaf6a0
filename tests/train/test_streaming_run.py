"""A run over a stream that is stopped and resumed elsewhere is the run that was not."""

import json
import shutil

import pytest

from moe_llm.cli import main
from moe_llm.data import streamed_blocks
from moe_llm.train.metrics import read_metrics


def test_a_resumed_run_over_a_stream_equals_an_uninterrupted_one(make_config, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed_blocks, "WINDOW_BYTES", 4000)
    rows = [json.dumps({"text": line}) for line in corpus.read_text(encoding="utf-8").splitlines() if line.strip()]
    (tmp_path / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
    source = {"type": "files", "path": str(tmp_path / "text.jsonl"), "streaming": True}

    def train(name, cache):
        data = {"sources": [source], "validation_fraction": 0.2, "cache_dir": str(tmp_path / cache)}
        path = make_config(name, data=data, checkpoint={"every_steps": 3}, train={"max_steps": 6})
        assert main(["train", str(path)]) == 0
        return read_metrics(tmp_path / name / "metrics.jsonl")

    whole = train("whole", "cache-a")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000006")
    resumed = train("cut", "cache-b")
    losses = [[record["lm_loss"] for record in records] for records in (whole, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=0)
    assert whole[-1]["val_loss"] == resumed[-1]["val_loss"]
    assert whole[-1]["sources"] == resumed[-1]["sources"]

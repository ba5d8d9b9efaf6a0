"""`moe-llm prepare` leaves everything that a run reads in the cache, checked, and says what it is."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from support import runs

from moe_llm.cli import main
from moe_llm.config import SourceConfig
from moe_llm.data import cache as cache_module
from moe_llm.data import pieces
from moe_llm.data.sources import fingerprint, hub_listing


@pytest.fixture
def config_file(tmp_path, make_text, tokenizer):
    (tmp_path / "a.txt").write_text("".join(make_text(seed) for seed in range(60)), encoding="utf-8")
    (tmp_path / "b.txt").write_text("".join(make_text(seed) for seed in range(100, 130)), encoding="utf-8")
    raw = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"vocab_size": len(tokenizer)},
        "tokenizer": {"path": tokenizer.name_or_path},
        "data": {
            "sources": [
                {"type": "files", "path": str(tmp_path / name), "document": "line"} for name in ("a.txt", "b.txt")
            ],
            "cache_dir": str(tmp_path / "cache"),
            "sequence_length": 16,
            "validation_fraction": 0.1,
        },
        "train": {"max_steps": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def prepare(config_file: Path, capsys, *overrides: str) -> dict:
    assert main(["prepare", str(config_file), "--json", *overrides]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_second_call_finds_everything_and_encodes_nothing(config_file, capsys, monkeypatch):
    first = prepare(config_file, capsys)
    monkeypatch.setattr(cache_module, "_build", lambda *args: pytest.fail("encoded again"))
    assert prepare(config_file, capsys) == first
    assert json.loads(Path(first.pop("path")).read_text(encoding="utf-8")) == first


def test_the_manifest_is_of_the_content_wherever_it_lies(config_file, capsys, tmp_path):
    first = prepare(config_file, capsys)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("a.txt", "b.txt"):
        shutil.copy(tmp_path / name, elsewhere / name)
    moved = prepare(
        config_file,
        capsys,
        f"data.sources.0.path={elsewhere / 'a.txt'}",
        f"data.sources.1.path={elsewhere / 'b.txt'}",
        f"data.cache_dir={tmp_path / 'other'}",
    )
    assert {**moved, "path": None} == {**first, "path": None}
    assert first["files"]["data.sources.0"] == [
        {
            "name": "a.txt",
            "size": (tmp_path / "a.txt").stat().st_size,
            "sha256": hashlib.sha256((tmp_path / "a.txt").read_bytes()).hexdigest(),
        }
    ]


def test_the_manifest_has_a_checksum_for_each_shard(config_file, capsys, tmp_path, monkeypatch):
    whole = prepare(config_file, capsys)["shards"]
    assert {name: list(found) for name, found in whole.items()} == {f"data.sources.{i}": ["."] for i in (0, 1)}
    monkeypatch.setattr(pieces, "SHARD_BYTES", 2000)
    cache = f"data.cache_dir={tmp_path / 'sharded'}"
    first = prepare(config_file, capsys, cache)["shards"]
    assert len(first["data.sources.0"]) > 2
    text = tmp_path / "a.txt"
    text.write_text(text.read_text(encoding="utf-8").replace("e", "a", 1), encoding="utf-8")
    second = prepare(config_file, capsys, cache)["shards"]
    assert second["data.sources.1"] == first["data.sources.1"]
    changed = {name for name, found in second["data.sources.0"].items() if found != first["data.sources.0"][name]}
    assert changed == {"00000"}, "the shard whose text has changed"


def test_the_manifest_names_the_files_of_a_hub_dataset(tmp_path, monkeypatch):
    import datasets

    asked = []

    class Builder:
        class config:
            data_files = {"train": ["hf://b@1f/2.parquet", "hf://b@1f/1.parquet"], "test": ["hf://b@1f/3.parquet"]}  # noqa: RUF012

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **kwargs: (asked.append(args), Builder)[1])
    source = SourceConfig(type="hub", path="a/b")
    expected = ["hf://b@1f/1.parquet", "hf://b@1f/2.parquet"]
    assert [hub_listing(source, "data.sources.0", tmp_path) for _ in range(2)] == [expected] * 2
    assert len(asked) == 1, "the second time without the hub"


def test_a_copy_of_a_local_dataset_is_the_same_text(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/train.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    os.utime(tmp_path / "b/train.jsonl", (1, 1))
    prints = [
        fingerprint(SourceConfig(type="hub", path=str(tmp_path / name)), "data.sources.0", tmp_path) for name in "ab"
    ]
    assert prints[0] == prints[1]
    (tmp_path / "b/train.jsonl").write_text('{"text": "two"}\n', encoding="utf-8")
    assert fingerprint(SourceConfig(type="hub", path=str(tmp_path / "b")), "data.sources.0", tmp_path) != prints[0]


def test_one_changed_character_changes_the_hash_and_that_source_alone(config_file, capsys, tmp_path):
    first = prepare(config_file, capsys)
    text = tmp_path / "b.txt"
    text.write_text(text.read_text(encoding="utf-8").replace("router", "routes", 1), encoding="utf-8")
    second = prepare(config_file, capsys)
    assert second["hash"] != first["hash"]
    changed = {new["source"] for old, new in zip(first["sources"], second["sources"]) if old != new}
    assert changed == {"data.sources.1"}


def test_damage_is_named_and_repaired_from_its_source_alone(config_file, capsys, tmp_path, monkeypatch, caplog):
    first = prepare(config_file, capsys)
    victim = max((tmp_path / "cache").glob("tokens-*/train.tokens.bin"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-2])
    builds = []
    original = cache_module._build
    monkeypatch.setattr(cache_module, "_build", lambda *args: (builds.append(1), original(*args)))
    assert prepare(config_file, capsys) == first
    assert len(builds) == 1
    assert "train.tokens.bin" in caplog.text


def test_missing_text_is_one_sentence_before_any_work(config_file, capsys, tmp_path):
    (tmp_path / "b.txt").unlink()
    assert main(["prepare", str(config_file)]) == 2
    assert "data.sources.1.path" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_what_is_prepared_is_told_by_source(config_file, capsys):
    assert main(["prepare", str(config_file)]) == 0
    out = capsys.readouterr().out
    assert "data.sources.0 (train): " in out
    assert "data.sources.1 (validation): " in out
    assert "manifest " in out


def test_a_tokenizer_of_another_runs_text_is_told(finished_run, corpus, tmp_path, capsys):
    """A copy of a configuration in which only the sources are others, of a run that has been trained."""
    run = runs.copy_run(finished_run, tmp_path / "run")
    other = shutil.copy(corpus, tmp_path / "other.txt")
    command = ["prepare", str(run / "config.yaml"), f"run.dir={run}"]
    told = f"{run}/tokenizer is of a run on other data.sources"
    assert main([*command, f"data.sources.0.path={other}"]) == 0
    assert told in capsys.readouterr().err
    assert main(command) == 0
    assert told not in capsys.readouterr().err

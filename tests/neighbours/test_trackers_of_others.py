"""MLflow and trackio are told what metrics.jsonl holds, under the same names and steps, in one run over resumes."""

import importlib

import pytest
from support import runs

from moe_llm.cli import main
from moe_llm.train.trackers import scalars

pytestmark = pytest.mark.neighbours


def twice(make_config, tmp_path, key: str) -> list[dict]:
    path = make_config(logging={"console": "off", key: True, "project": "tried"})
    assert main(["train", str(path), "train.max_steps=3"]) == 0
    assert main(["train", str(path)]) == 0
    return [scalars(record) for record in runs.records(tmp_path / "run")]


def series(records: list[dict], name: str) -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in records if name in record]


def test_mlflow_has_the_records_of_both_starts_in_one_run(make_config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    records = twice(make_config, tmp_path, "mlflow")
    (run,) = mlflow.search_runs(experiment_names=["tried"], output_format="list")
    assert run.data.params["train.global_batch_size"] == "4"
    for name in records[-1].keys() - {"step"}:
        found = mlflow.MlflowClient().get_metric_history(run.info.run_id, name)
        told = sorted((metric.step, metric.value) for metric in found)
        assert told == [pytest.approx(pair) for pair in series(records, name)], name


def test_trackio_has_the_records_of_both_starts_in_one_run(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    records = twice(make_config, tmp_path, "trackio")
    (run,) = trackio.Api().runs("tried")
    logs = importlib.import_module("trackio.sqlite_storage").SQLiteStorage.get_logs("tried", run.name)
    for name in ("train/loss", "moe/load_cv/layer_1", "eval/loss"):
        told = [(entry["step"], entry[name]) for entry in logs if name in entry]
        assert told == [pytest.approx(pair) for pair in series(records, name)], name

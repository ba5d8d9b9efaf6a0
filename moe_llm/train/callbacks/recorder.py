"""Records of a run: config.yaml, metrics.jsonl, facts.json, trackers, and the alarms that records raise."""

from pathlib import Path
from typing import Any

from moe_llm.atomic import write_atomically
from moe_llm.config import Config, dump_config
from moe_llm.train.callbacks.alarms import Alarms
from moe_llm.train.callbacks.base import Callback, TrainingRun
from moe_llm.train.facts import write_facts
from moe_llm.train.metrics import MetricsFile, read_metrics
from moe_llm.train.trackers import Tracker, build_trackers, check_trackers


class Recorder(Callback):
    """Writes every record to every place that the configuration names, with its alarms; on the main rank alone."""

    def __init__(self) -> None:
        self._sinks: list[Tracker | MetricsFile] = []

    def validate(self, config: Config) -> None:
        check_trackers(config)

    def on_train_begin(self, run: TrainingRun) -> None:
        if not run.runtime.is_main:
            return
        config, step = run.config, run.position.step
        _write_config(config, run.run_dir)
        self._sinks.append(MetricsFile(run.run_dir / "metrics.jsonl", step))
        self._sinks += build_trackers(config, run.run_dir, step)
        if run.facts is not None and step < config.max_steps:  # a start that trains nothing is none to report
            write_facts(run.run_dir / "facts.json", run.facts)
        self._replay(run)

    def _replay(self, run: TrainingRun) -> None:
        """Bring the alarms to where the records end, so that none is raised twice."""
        self._alarms = Alarms(run.config)
        self._alarms.replay(read_metrics(run.run_dir / "metrics.jsonl"))

    def on_record(self, run: TrainingRun, record: dict[str, Any]) -> None:
        if not self._sinks:
            return
        alarms = self._alarms.look(record)
        if alarms:
            record = record | {"alarms": [alarm.record() for alarm in alarms]}
        for sink in self._sinks:
            sink.write(record)
        for alarm in alarms:
            run.say(f"alarm at step {record['step']}: {alarm.sentence}")

    def on_rollback(self, run: TrainingRun) -> None:
        for sink in self._sinks:
            sink.rewind(run.position.step)
        if self._sinks:
            self._replay(run)

    def on_close(self, run: TrainingRun) -> None:
        for sink in self._sinks:
            sink.close()


def _write_config(config: Config, run_dir: Path) -> None:
    """In one step: a file cut short by a crash would shut its owner out of the run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.yaml", dump_config(config))

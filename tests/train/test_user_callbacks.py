"""A user's own callback: found by path or by entry point, called at every hook, its state in every checkpoint."""

import json
import sys
from pathlib import Path

import pytest
from support import runs

import moe_llm
from moe_llm.cli import main

COUNTER = """
from pathlib import Path
from moe_llm.errors import UserError
from moe_llm.train.callbacks import Callback

class Counter(Callback):
    def __init__(self, start=0, log=None):
        self.seen, self.log = [start], log
    def validate(self, config):
        if config.train.max_steps == 77:
            raise UserError("train.max_steps=77 is too odd: use another")
    def note(self, hook, run):
        if self.log is not None and run.runtime.is_main:
            with Path(self.log).open("a") as file:
                file.write(f"{hook} {run.position.step} {type(self).__name__}\\n")
    def on_train_begin(self, run):
        self.note("train_begin", run)
    def on_step_begin(self, run):
        self.note("step_begin", run)
    def on_backward_end(self, run):
        self.note("backward_end", run)
        assert run.engine.gradient_square() > 0
    def on_step_end(self, run):
        self.note("step_end", run)
        self.seen.append(run.position.step)
    def on_evaluate(self, run, metrics):
        self.note("evaluate", run)
        metrics["seen"] = len(self.seen)
    def on_record(self, run, record):
        self.note("record", run)
        assert record["step"] == run.position.step and "lm_loss" in record
    def on_save(self, run, checkpoint):
        self.note("save", run)
        assert (checkpoint / "config.json").is_file()
    def on_train_end(self, run):
        self.note("train_end", run)
    def state_dict(self):
        return {"seen": self.seen}
    def load_state_dict(self, state):
        self.seen = state["seen"]

class Second(Counter):
    pass

class Unsaved(Callback):
    def state_dict(self):
        return {"pair": (1, 2)}

class Failing(Counter):
    def on_step_end(self, run):
        raise RuntimeError("as planned")
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The module user_callbacks, found as an installed one is, here and in processes that are started."""
    (tmp_path / "user_callbacks.py").write_text(COUNTER)
    info = tmp_path / "user_callbacks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: user-callbacks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moe_llm.callbacks]\ncounter = user_callbacks:Counter\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    yield tmp_path
    sys.modules.pop("user_callbacks", None)


def saved(run_dir: Path, step: int) -> dict:
    return json.loads((run_dir / f"checkpoints/step-{step:08d}/trainer/state.json").read_text())["trainer"]["callbacks"]


def with_callbacks(*callbacks: dict, max_steps: int = 2, **train) -> dict:
    return {"train": {"max_steps": max_steps, "callbacks": list(callbacks), **train}, "checkpoint": {"every_steps": 1}}


def test_hooks_come_in_order_with_arguments_and_act_on_records(train, package):
    log = package / "log"
    given = (
        {"path": "user_callbacks.Second", "args": {"log": str(log)}},
        {"name": "counter", "args": {"log": str(log), "start": 5}},
    )
    run_dir = train(**with_callbacks(*given))
    step = ["step_begin", "backward_end", "step_end", "record", "save"]
    last = [*step[:3], "evaluate", *step[3:]]
    at = [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    hooks = zip(["train_begin", *step, *last, "train_end"], at)
    expected = [f"{hook} {number} {name}" for hook, number in hooks for name in ("Second", "Counter")]
    assert log.read_text().splitlines() == expected
    assert saved(run_dir, 2) == {"user_callbacks.Second": {"seen": [0, 1, 2]}, "counter": {"seen": [5, 1, 2]}}
    assert runs.records(run_dir)[-1]["seen"] == 3


def test_state_survives_a_resume_at_another_layout(make_config, package, tmp_path, two_ranks_of_a_run):
    given = {"path": "user_callbacks.Counter", "args": {"start": 9}}
    config = make_config(**with_callbacks(given, given, max_steps=3))
    assert main(["train", str(config), "train.max_steps=1"]) == 0
    elsewhere = ["train", str(config), "parallel.expert_parallel_size=2", "parallel.zero_stage=2"]
    assert two_ranks_of_a_run.run(main, elsewhere) == [0, 0]
    state = {"seen": [9, 1, 2, 3]}
    assert saved(tmp_path / "run", 3) == {"user_callbacks.Counter": state, "user_callbacks.Counter#2": state}


def test_going_back_to_a_checkpoint_restores_the_state_of_callbacks(make_config, package, tmp_path, monkeypatch):
    from moe_llm.train.callbacks.step_guard import StepGuard

    inspect = StepGuard.inspect

    def planted(self, step, samples, losses):
        if step == 2 and next(bad, False):
            losses = [loss * float("nan") for loss in losses]
        return inspect(self, step, samples, losses)

    bad = iter([True])
    monkeypatch.setattr(StepGuard, "inspect", planted)
    config = make_config(**with_callbacks({"name": "counter"}, on_nan="rollback"))
    assert main(["train", str(config)]) == 0
    assert next(bad, None) is None  # the fault has come about
    assert saved(tmp_path / "run", 2)["counter"] == {"seen": [0, 1, 2]}


def test_of_a_feature_that_is_off_nothing_is_imported_and_nothing_is_saved(train, monkeypatch):
    optional = ("adversarial", "alternating_updates", "distillation", "early_stopping", "ema", "router_guard")
    for name in optional:
        monkeypatch.delitem(sys.modules, f"moe_llm.train.callbacks.{name}", raising=False)
    run_dir = train(train={"max_steps": 1})
    assert not [name for name in optional if f"moe_llm.train.callbacks.{name}" in sys.modules]
    state = json.loads((run_dir / "checkpoints/latest/trainer/state.json").read_text())
    assert "callbacks" not in state["trainer"]


def test_a_callback_that_only_watches_changes_no_number(train, package):
    plain = runs.timeless(train("plain", train={"max_steps": 2}, checkpoint={"every_steps": 1}))
    watched = runs.timeless(train("watched", **with_callbacks({"name": "counter"})))
    assert watched[-1].pop("seen") == 3
    assert watched == plain


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "train.callbacks.0.name=null and path are both missing: give one of the two"),
        ({"name": "counter", "path": "a.B"}, "train.callbacks.0.name=counter is given together with path"),
        ({"name": "conter"}, r"train.callbacks.0.name=conter is no callback .*\(one of counter\): use path"),
        ({"name": "counter", "strat": 3}, r"unknown configuration key train\.callbacks\.0\.strat"),
        ({"path": "Counter"}, "train.callbacks.0.path=Counter names no module: write package.module.Class"),
        ({"path": "user_callbacks.Nothing"}, "path=user_callbacks.Nothing cannot be imported"),
        ({"path": "no_such_package.X"}, "path=no_such_package.X cannot be imported .*PYTHONPATH"),
        ({"path": "pathlib.Path"}, "path=pathlib.Path is no callback: derive a class"),
        (
            {"name": "counter", "args": {"strat": 3}},
            r"Counter takes other arguments .*strat.*Counter\(start=0, log=None\)",
        ),
        ({"path": "user_callbacks.Unsaved"}, "the state of callback user_callbacks.Unsaved cannot be saved"),
    ],
)
def test_what_is_no_callback_is_refused_before_any_step(given, sentence, make_config, package, tmp_path):
    with pytest.raises(moe_llm.UserError, match=sentence):
        moe_llm.train(moe_llm.load_config(make_config(**with_callbacks(given))))
    assert runs.steps_written(tmp_path / "run") == 0


def test_a_callback_refuses_a_configuration_before_anything_is_written(make_config, package, tmp_path, capsys):
    config = make_config(**with_callbacks({"name": "counter"}, max_steps=77))
    assert main(["train", str(config)]) == 2
    assert "train.max_steps=77 is too odd: use another" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_last_hook_comes_after_a_failure_too(make_config, package):
    log = package / "log"
    config = make_config(**with_callbacks({"path": "user_callbacks.Failing", "args": {"log": str(log)}}))
    with pytest.raises(RuntimeError, match="as planned"):
        main(["train", str(config)])
    assert log.read_text().splitlines()[-1] == "train_end 1 Failing"


def test_a_checkpoint_from_elsewhere_says_which_states_it_lacks(make_config, package, tmp_path, capsys):
    assert main(["train", str(make_config("first", **with_callbacks({"name": "counter"}, max_steps=1)))]) == 0
    second = make_config("second", **with_callbacks({"path": "user_callbacks.Second"}))
    assert main(["train", str(second), f"checkpoint.resume={tmp_path}/first/checkpoints/latest"]) == 0
    told = capsys.readouterr().err
    assert "the checkpoint has no state of callback user_callbacks.Second: it starts without one" in told
    assert "the checkpoint has the state of callback counter, which train.callbacks does not list" in told

"""Early stopping: when it ends a run, what it keeps, and that a stop and a resume in between change nothing."""

import json
import math
import shutil

import pytest
from support import runs
from support.ci import dear

from moe_llm.cli import main
from moe_llm.config.load import validate
from moe_llm.train.callbacks.early_stopping import EarlyStopping, why_ended
from moe_llm.train.callbacks.registry import build_callbacks
from moe_llm.train.position import Position

# by step; evaluated at every one, the best is that of step 3
LOSSES = {1: 5.0, 2: 4.0, 3: 3.0, 4: 3.5, 5: 2.95, 6: math.nan, 7: 3.2, 8: 1.0}
CHANGES = {
    "train": {"max_steps": 8, "early_stopping": {"patience": 3, "min_delta": 0.1}},
    "evaluate": {"every_steps": 1},
    "checkpoint": {"every_steps": None, "keep_last": 1},
    "optim": {"lr": 1e-3, "schedule": "constant"},
}


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    """The validation loss of a step is what LOSSES says."""
    at = {}
    judge = EarlyStopping.on_evaluate

    def noted(self, run, metrics):
        metrics["val_loss"] = LOSSES[run.position.step]
        at["step"] = run.position.step
        judge(self, run, metrics)

    monkeypatch.setattr(EarlyStopping, "on_evaluate", noted)
    return at


def checkpoints(run_dir) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def state(run_dir, step: int) -> dict:
    return json.loads((run_dir / f"checkpoints/step-{step:08d}/trainer/state.json").read_text())["trainer"]


def test_a_run_ends_when_the_loss_no_longer_falls_and_keeps_the_best(make_config, tmp_path, capsys):
    config, run_dir = make_config(**CHANGES), tmp_path / "run"
    assert main(["train", str(config)]) == 0
    out, err = capsys.readouterr()
    assert [r["step"] for r in runs.records(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert checkpoints(run_dir) == ["best", "checkpoints.json", "latest", "step-00000003", "step-00000006"]
    assert (run_dir / "checkpoints/best").resolve().name == "step-00000003"
    assert "stopping early at step 6: in 3 evaluations the validation loss has not fallen by more than 0.1" in err
    assert f"best checkpoint: {run_dir}/checkpoints/step-00000003 (validation loss 3.0000)\n" in out
    assert state(run_dir, 6).items() >= {"best_loss": 3.0, "best_step": 3, "waited": 3}.items()

    before = runs.fingerprint(run_dir / "checkpoints")
    assert main(["train", str(config)]) == 0  # the same again has nothing to do
    assert "stopping early at step 6" in capsys.readouterr().err
    assert runs.fingerprint(run_dir / "checkpoints") == before

    assert main(["train", str(config), "train.early_stopping.patience=5"]) == 0
    assert "stopping early" not in capsys.readouterr().err
    assert [r["step"] for r in runs.records(run_dir)] == list(range(1, 9))
    assert checkpoints(run_dir) == ["best", "checkpoints.json", "latest", "step-00000008"]
    assert (run_dir / "checkpoints/best").resolve().name == "step-00000008"


@pytest.mark.parametrize("asynchronous", dear([False, True], True))
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(make_config, tmp_path, asynchronous):
    changes = {**CHANGES, "checkpoint": CHANGES["checkpoint"] | {"async": asynchronous}}
    stopped, straight = make_config("stopped", **changes), make_config("straight", **changes)
    assert main(["train", str(straight)]) == 0
    assert main(["train", str(stopped), "train.max_steps=4"]) == 0
    assert main(["train", str(stopped), "train.max_steps=5"]) == 0
    assert main(["train", str(stopped)]) == 0
    assert runs.timeless(tmp_path / "stopped") == runs.timeless(tmp_path / "straight")
    assert checkpoints(tmp_path / "stopped") == checkpoints(tmp_path / "straight")
    assert state(tmp_path / "stopped", 6) == state(tmp_path / "straight", 6)


def test_without_its_best_checkpoint_a_run_begins_to_look_anew(make_config, tmp_path, capsys):
    config, run_dir = make_config(**CHANGES), tmp_path / "run"
    assert main(["train", str(config), "train.max_steps=5"]) == 0
    shutil.rmtree(run_dir / "checkpoints/step-00000003")
    capsys.readouterr()
    assert main(["train", str(config)]) == 0
    assert "the best checkpoint so far, of step 3, is not in" in capsys.readouterr().err
    assert state(run_dir, 8).items() >= {"best_loss": 1.0, "best_step": 8, "waited": 0}.items()


def test_off_leaves_no_trace(make_config, tmp_path):
    changes = {**CHANGES, "train": {"max_steps": 5}}
    assert main(["train", str(make_config(**changes))]) == 0
    assert checkpoints(tmp_path / "run") == ["checkpoints.json", "latest", "step-00000005"]
    assert not state(tmp_path / "run", 5).keys() & {"best_loss", "best_step", "waited"}


def test_going_back_to_a_checkpoint_takes_its_memory_along(make_config, tmp_path, monkeypatch):
    """The evaluations of steps that were lost count no longer."""
    from moe_llm.distributed import step_loss

    share, steps = step_loss.StepLosses, []

    def planted(self, output):
        losses = real(self, output)
        steps.append(None)
        return losses if len(steps) != 11 else share(losses.total * math.nan, *losses[1:])  # in step 6, of 2 each

    real = step_loss.StepLoss.__call__
    monkeypatch.setattr(step_loss.StepLoss, "__call__", planted)
    changes = {
        **CHANGES,
        "train": {**CHANGES["train"], "on_nan": "rollback"},
        "checkpoint": {"every_steps": 4, "keep_last": 1},
    }
    assert main(["train", str(make_config(**changes))]) == 0
    # step 5, lost and done again, is waited for once: 4, 5, 6
    assert runs.records(tmp_path / "run")[-1]["step"] == 6
    assert state(tmp_path / "run", 6)["waited"] == 3


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        ("evaluate", {"every_steps": None}, "train.early_stopping.patience=3"),
        ("train", {"early_stopping": {"min_delta": 0.1}}, "applies to nothing without patience"),
    ],
)
def test_what_cannot_work_is_refused(section, values, sentence, tmp_path):
    raw = runs.sections(tmp_path / "text.txt", tmp_path, tmp_path, **CHANGES)
    raw[section] = raw[section] | values
    with pytest.raises(ValueError, match=sentence):
        validate(raw)


def test_the_default_never_ends_a_run():
    config, position = validate(runs.sections("text.txt", "cache", "run")), Position(step=1, waited=1000)
    assert why_ended(config, position) is None
    assert "early_stopping" not in build_callbacks(config)

"""Whole runs that meet a batch which is not finite: stop, skip and rollback; spikes."""

import json
import math
import random
from itertools import pairwise

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moe_llm.checkpoint import manifest
from moe_llm.cli import main
from moe_llm.train import trainer
from moe_llm.train.callbacks.step_guard import SpikeDetector

STEPS, BAD = 8, 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    words = ["def ", "return ", "x", "y", "(", ")", "\n", "    ", "for ", "in ", "range", ":", "=", "+", "1"]
    for i in range(12):
        text = "".join(random.Random(i).choices(words, k=400))
        (root / f"{i}.txt").write_text(text)
    return root


@pytest.fixture
def train(corpus, tmp_path, monkeypatch):
    """Run with overrides; the loss of the given samples' batches is made NaN. The exit code, and the run directory."""

    def run(*overrides: str, bad: tuple[int, ...] = (), name: str = "run") -> tuple[int, object]:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump(
                {
                    "run": {"dir": str(tmp_path / name)},
                    "model": {
                        "vocab_size": 300,
                        "hidden_size": 16,
                        "intermediate_size": 16,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 2,
                        "num_key_value_heads": 1,
                        "num_local_experts": 4,
                        "num_experts_per_tok": 2,
                        "max_position_embeddings": 64,
                    },
                    "data": {
                        "sources": [{"type": "files", "path": str(corpus / "*.txt")}],
                        "sequence_length": 32,
                        "validation_fraction": 0.2,
                        "cache_dir": str(corpus / "cache"),
                    },
                    "optim": {"lr": 1e-3, "schedule": "constant"},
                    "train": {
                        "max_steps": STEPS,
                        "micro_batch_size": 2,
                        "global_batch_size": 4,
                        "precision": "fp32",
                        "device": "cpu",
                    },
                    "checkpoint": {"every_steps": 4},
                    "evaluate": {"max_blocks": 2},
                    "logging": {"console": "plain"},
                }
            )
        )
        batch_number = iter(range(10**6))

        class Spoiled(trainer.StepLoss):
            def __call__(self, output):
                losses = super().__call__(output)
                if next(batch_number) // 2 + first in bad:
                    losses = losses._replace(total=losses.total * math.nan, lm=losses.lm * math.nan)
                return losses

        saved = sorted((tmp_path / name / "checkpoints").glob("step-*"))
        first = json.loads((saved[-1] / "trainer/state.json").read_text())["trainer"]["samples"] // 4 if saved else 0
        with monkeypatch.context() as patched:
            patched.setattr(trainer, "StepLoss", Spoiled)
            return main(["train", str(path), *overrides]), tmp_path / name

    return run


def records(run_dir) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def trainer_state(run_dir, step: int) -> dict:
    return json.loads((run_dir / f"checkpoints/step-{step:08d}/trainer/state.json").read_text())["trainer"]


def timeless(run_dir) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records(run_dir)]


def test_stop_saves_what_was_before_and_says_how_to_go_on(train, capsys):
    code, run_dir = train(bad=(BAD - 1,))
    err = capsys.readouterr().err
    assert code == 1
    assert err.count("moe-llm: error:") == 1
    # the batch of step 6: samples 20 to 23; both micro-batches of it were spoiled
    assert "step 6 (samples 20 to 23) is not finite; the loss is not, of samples 20 to 21, 22 to 23" in err
    assert "the weights of step 5 are saved" in err
    assert "train.on_nan=skip" in err
    assert trainer_state(run_dir, BAD - 1) == {"step": 5, "samples": 20, "tokens": 640, "skipped": 0}
    assert [r["step"] for r in records(run_dir)] == [1, 2, 3, 4, 5]

    # the remedy, as told: the same command, with a key that a run may change
    assert train("train.on_nan=skip", bad=(BAD - 1,))[0] == 0
    resumed = timeless(run_dir)
    assert train("train.on_nan=skip", bad=(BAD - 1,), name="straight")[0] == 0
    assert resumed == timeless(run_dir.with_name("straight"))


def test_nothing_is_saved_where_nothing_was_learned(train, capsys):
    code, run_dir = train(bad=(0,))
    assert code == 1
    assert "nothing is changed" in capsys.readouterr().err
    assert not list(run_dir.glob("checkpoints/step-*"))


def test_skip_leaves_the_batch_out_and_says_so(train, capsys):
    code, run_dir = train("train.on_nan=skip", "logging.plots=true", bad=(0, BAD - 1))
    assert code == 0
    assert "its batch is left out (train.on_nan=skip)" in capsys.readouterr().err
    found = records(run_dir)
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    for record in found:
        bad = record["step"] in (1, BAD)
        assert record.get("skipped", False) == bad
        assert (record["loss"] is None) == (record["grad_norm"] is None) == bad
    assert found[BAD - 1]["trouble"]["samples"] == [[20, 21], [22, 23]]
    assert trainer_state(run_dir, STEPS) == {"step": 8, "samples": 32, "tokens": 1024, "skipped": 2}
    assert all((run_dir / f"plots/{name}.png").exists() for name in ("loss", "expert_load"))


def test_skipped_steps_do_not_count_for_the_optimizer_after_a_resume(train):
    """AdamW corrects by the number of its updates, which is not that of the steps."""
    assert train("train.on_nan=skip", bad=(0, 2), name="straight")[0] == 0
    assert train("train.on_nan=skip", "train.max_steps=4", bad=(0, 2), name="stopped")[0] == 0
    code, run_dir = train("train.on_nan=skip", bad=(0, 2), name="stopped")
    assert code == 0
    assert timeless(run_dir)[4:] == timeless(run_dir.with_name("straight"))[4:]


def test_skipping_before_the_first_update_can_be_saved(train):
    code, run_dir = train(
        "train.on_nan=skip", "train.max_bad_steps=9", "checkpoint.every_steps=1", "train.max_steps=2", bad=(0, 1)
    )
    assert code == 0
    assert trainer_state(run_dir, 2)["skipped"] == 2


def test_rollback_goes_back_and_on_behind_the_batch(train, capsys):
    code, run_dir = train("train.on_nan=rollback", bad=(BAD - 1,))
    assert code == 0
    assert "back to the weights of step 4, on with the data behind its batch" in capsys.readouterr().err
    found = records(run_dir)
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    assert [r.get("rolled_back_from") for r in found] == [None] * 4 + [BAD] + [None] * 3
    # 8 steps that count, the step lost between checkpoint and fault, and the fault
    assert trainer_state(run_dir, STEPS) == {"step": 8, "samples": 40, "tokens": 1024, "skipped": 0}


def test_after_a_rollback_all_is_as_after_a_restart_from_that_checkpoint(train, tmp_path):
    """In the process, the engine has nothing left of the lost steps."""
    _, run_dir = train("train.on_nan=rollback", bad=(BAD - 1,))
    _, other = train("train.on_nan=rollback", "train.max_steps=4", name="other")
    checkpoint = other / "checkpoints/step-00000004"
    head = json.loads((checkpoint / "trainer/state.json").read_text())
    head["trainer"]["samples"] = 24
    changed = {"trainer/state.json": manifest.write_json(checkpoint / "trainer/state.json", head)}
    manifest.write_manifest(checkpoint, manifest.read_manifest(checkpoint) | changed)
    assert train("train.on_nan=rollback", name="other")[0] == 0
    ours = [r["loss"] for r in records(run_dir)[4:]]
    assert ours == [r["loss"] for r in records(other)[4:]]


def test_rollbacks_that_do_not_help_end(train, capsys):
    code, run_dir = train("train.on_nan=rollback", "train.max_bad_steps=2", bad=tuple(range(4, 50)))
    assert code == 1
    assert "more than train.max_bad_steps=2 such steps" in capsys.readouterr().err
    assert trainer_state(run_dir, 4)["step"] == 4


def test_rollback_without_a_checkpoint_yet_leaves_the_batch_out(train, capsys):
    code, run_dir = train("train.on_nan=rollback", bad=(1,))
    assert code == 0
    assert [r["step"] for r in records(run_dir) if r.get("skipped")] == [2]


def test_rollback_needs_checkpoints(train, capsys):
    assert train("train.on_nan=rollback", "checkpoint.every_steps=null")[0] == 2
    assert "train.on_nan" in capsys.readouterr().err


def test_weights_that_an_update_spoiled_are_not_saved(train, monkeypatch, capsys):
    from moe_llm.distributed.engine import LocalEngine

    step = LocalEngine.step

    def spoil(self, lr):
        norm = step(self, lr)
        if self.optimizer.state[self._trained[0]]["step"] == 4:
            with torch.no_grad():
                self._trained[0][0, 0] = math.inf
        return norm

    with monkeypatch.context() as patched:
        patched.setattr(LocalEngine, "step", spoil)
        code, run_dir = train()
    assert code == 1
    assert "the weights of step 4 are not finite and are not saved" in capsys.readouterr().err
    assert not list(run_dir.glob("checkpoints/step-*"))


def curve(steps: int, noise: float, seed: int) -> list[float]:
    generator = random.Random(seed)
    return [2.0 + 8.0 * math.exp(-step / 150) + noise * generator.gauss(0, 1) for step in range(steps)]


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_falling_curve_is_no_spike(noise, seed):
    detector = SpikeDetector(8.0)
    assert [step for step, loss in enumerate(curve(2000, noise, seed)) if detector.add(loss)] == []


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05])
def test_a_planted_spike_is_told_and_nothing_after_it(noise):
    detector, losses = SpikeDetector(8.0), curve(2000, noise, 1)
    for step in (500, 501, 1200):
        losses[step] += 1.5
    assert [step for step, loss in enumerate(losses) if detector.add(loss)] == [500, 501, 1200]


def test_a_lasting_level_is_followed_and_off_is_off():
    detector, off = SpikeDetector(8.0), SpikeDetector(None)
    losses = [2.0] * 100 + [4.0] * 100
    told = [step for step, loss in enumerate(losses) if detector.add(loss)]
    assert told == list(range(100, 100 + SpikeDetector.WINDOW // 2))
    assert not any(off.add(loss) for loss in losses)


def test_a_spike_reaches_record_and_console(train, monkeypatch, capsys):
    monkeypatch.setattr(SpikeDetector, "WARM_UP", 3)
    original = SpikeDetector.add
    calls = iter(range(100))
    monkeypatch.setattr(SpikeDetector, "add", lambda self, x: original(self, x * (2 if next(calls) == 5 else 1)))
    _, run_dir = train("logging.every_steps=100")  # a record at each save, too
    assert [(r["step"], r.get("spike", False)) for r in records(run_dir)] == [(4, False), (6, True), (8, False)]
    assert "step 6: loss " in capsys.readouterr().err


def test_a_step_that_is_left_out_gives_its_turn_to_the_next(train):
    """With routers in turns with the rest; and a run that is resumed after it goes on as the uninterrupted one."""
    overrides = ("train.on_nan=skip", "train.adversarial.router_every=2", "checkpoint.every_steps=1")
    code, run_dir = train(*overrides, bad=(3,))
    assert code == 0
    weights = [load_file(run_dir / f"checkpoints/step-{step:08d}/model.safetensors") for step in range(1, STEPS + 1)]
    changed = []
    for before, after in pairwise(weights):
        names = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        changed.append({"routers" if ".gate." in name else "rest" for name in names})
    assert changed == [{"routers"}, {"rest"}, set(), {"routers"}, {"rest"}, {"routers"}, {"rest"}]

    assert train(*overrides, "train.max_steps=5", bad=(3,), name="again")[0] == 0
    code, again = train(*overrides, name="again")
    assert code == 0
    last = load_file(again / f"checkpoints/step-{STEPS:08d}/model.safetensors")
    assert all(torch.equal(tensor, weights[-1][name]) for name, tensor in last.items())

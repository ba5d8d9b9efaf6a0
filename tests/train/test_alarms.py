"""Alarms: planted trouble raises its own, a healthy run none, each once until it has passed."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import runs
from support.training import config

from moe_llm.train.callbacks.alarms import Alarms

WINDOW = {"logging": {"console": "plain", "alarms": {"window_steps": 3}}}


def alarms_of(run_dir) -> dict[str, list]:
    """Places by kind, over the whole run."""
    found: dict[str, list] = {}
    for record in runs.records(run_dir):
        for alarm in record.get("alarms", []):
            found.setdefault(alarm["kind"], []).extend(alarm["places"])
    return found


@pytest.fixture
def planted(finished_run, tmp_path):
    """A checkpoint whose embeddings share a direction, along which the router of layer 0 prefers or shuns expert 1."""

    def plant(strength: float):
        directory = shutil.copytree((finished_run / "checkpoints/latest").resolve(), tmp_path / "planted")
        shutil.rmtree(directory / "trainer")
        weights = load_file(directory / "model.safetensors")
        common_D = torch.ones(weights["model.embed_tokens.weight"].shape[1])
        weights["model.embed_tokens.weight"] += 3 * common_D
        for layer in (0, 1):
            gate_ED = weights[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
            gate_ED -= gate_ED.mean(-1, keepdim=True)  # all others are blind to it
        weights["model.layers.0.block_sparse_moe.gate.weight"][1] = strength * common_D
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return plant


def start_from(directory, **model) -> dict:
    return {**WINDOW, "model": {"init_from": str(directory), **model}, "optim": {"lr": 1e-5}}


def test_a_healthy_run_raises_none(train, capsys):
    run_dir = train(**WINDOW, train={"max_steps": 12, "micro_batch_size": 2, "global_batch_size": 4})
    assert alarms_of(run_dir) == {}
    assert "alarm" not in capsys.readouterr().err
    norms = runs.records(run_dir)[0]["moe"]["expert_grad_norm"]
    assert [len(layer) for layer in norms] == [4, 4]
    assert all(norm > 0 for layer in norms for norm in layer)


def test_a_planted_dead_expert_is_told_once_with_what_to_try(train, planted, capsys):
    run_dir = train(**start_from(planted(-4.0)))
    assert alarms_of(run_dir) == {"dying_expert": [[0, 1]]}
    shown = [line for line in capsys.readouterr().err.splitlines() if "alarm" in line]
    assert len(shown) == 1
    assert shown[0].startswith("alarm at step 3: layer 0 expert 1: dying, with down to 0.0% of an even share")
    assert "try a larger model.router_aux_loss_coef (now 0.02)" in shown[0]


def test_a_collapsing_router_is_told(train, planted):
    run_dir = train(**start_from(planted(4.0), router_aux_loss_coef=0.0))
    assert alarms_of(run_dir)["router_collapse"] == [[0]]


def test_no_window_no_alarms(train, planted):
    changes = start_from(planted(-4.0))
    changes["logging"] = {"console": "off", "alarms": {"window_steps": None}}
    assert alarms_of(train(**changes)) == {}


def test_an_interrupted_run_tells_what_an_uninterrupted_one_does(train, planted, capsys):
    directory = planted(-4.0)
    run_dir = train(**start_from(directory), train={"max_steps": 6, "micro_batch_size": 2, "global_batch_size": 4})
    whole = runs.timeless(run_dir)
    shutil.rmtree(run_dir / "checkpoints/step-00000006")
    capsys.readouterr()
    train(**start_from(directory), train={"max_steps": 6, "micro_batch_size": 2, "global_batch_size": 4})
    assert runs.timeless(run_dir) == whole
    assert "alarm at" not in capsys.readouterr().err


# the rules alone, on records made by hand: one layer of four experts


def record(step: int, counts=(10, 10, 10, 10), entropy=1.3, norms=(1.0, 1.0, 1.0, 1.0), **more) -> dict:
    moe = {"tokens_per_expert": [list(counts)], "router_entropy": [entropy], "expert_grad_norm": [list(norms)]}
    return {"step": step, "moe": moe, **more}


def told(records, **settings) -> list[tuple[int, str]]:
    alarms = Alarms(config(1, 1, 1, logging={"alarms": {"window_steps": 4, **settings}}))
    return [(r["step"], alarm.kind) for r in records for alarm in alarms.look(r)]


def stretch(first: int, steps: int, **what) -> list[dict]:
    return [record(step, **what) for step in range(first, first + steps)]


DEAD = {"counts": (20, 20, 0, 0), "norms": (1.0, 1.0, 1.0, 1.0)}


def test_an_alarm_comes_again_after_it_has_passed_and_not_before():
    assert told(stretch(1, 8) + stretch(9, 30, **DEAD), load_cv=None) == [(12, "dying_expert")]
    back = stretch(1, 8, **DEAD) + stretch(9, 8) + stretch(17, 8, **DEAD)
    assert told(back, load_cv=None) == [(4, "dying_expert"), (20, "dying_expert")]
    barely = stretch(1, 8, **DEAD) + stretch(9, 8, counts=(20, 20, 0.6, 0.6)) + stretch(17, 8, **DEAD)
    assert told(barely, load_cv=None) == [(4, "dying_expert")], "the margin has not been passed"


@pytest.mark.parametrize(
    ("settings", "trouble", "kind"),
    [
        ({"dead_share": 0.3}, {"counts": (20, 20, 20, 4)}, "dying_expert"),
        ({"entropy_share": 0.5}, {"entropy": 0.49 * math.log(4)}, "router_collapse"),
        ({"load_cv": 0.4}, {"counts": (20, 10, 5, 5)}, "load_drift"),
        ({"gradient_ratio": 5.0}, {"norms": (1.0, 1.0, 1.1, 6.0)}, "gradient_outlier"),
    ],
)
def test_each_threshold_acts(settings, trouble, kind):
    records = stretch(1, 4) + stretch(5, 8, **trouble)
    assert [found for _, found in told(records, **settings)] == [kind]
    assert told(records) == []


def test_loads_that_were_never_even_do_not_drift():
    assert told(stretch(1, 20, counts=(30, 4, 4, 4)), load_cv=0.5) == []


def test_gradients_missing_for_long_of_an_expert_with_tokens():
    gone = {"norms": (1.0, 1.0, 0.0, 1.0)}
    assert told(stretch(1, 4) + stretch(5, 3, **gone) + stretch(8, 4)) == []
    assert told(stretch(1, 4) + stretch(5, 8, **gone)) == [(8, "no_gradient")]
    assert told(stretch(1, 8, norms=(1.0, None, None, 1.0))) == [], "what is not trained has none"
    starved = told(stretch(1, 8, counts=(20, 20, 0, 20), **gone))
    assert [kind for _, kind in starved] == ["dying_expert"], "that it has no gradient either says nothing more"


def test_a_single_spike_and_a_skipped_step_are_none():
    spike = [*stretch(1, 6), record(7, norms=(1.0, 1.0, 1.0, 900.0)), *stretch(8, 6)]
    assert told(spike) == []
    assert told(stretch(1, 8, skipped=True, **DEAD)) == []


def test_the_window_counts_steps_not_records():
    sparse = [record(10 * i, **DEAD) for i in range(1, 4)]
    assert told(sparse, window_steps=20, load_cv=None) == [(20, "dying_expert")]


def test_layers_are_counted_over_all_blocks_those_without_experts_too():
    alarms = Alarms(config(1, 1, 1, model={"mlp_only_layers": [0]}, logging={"alarms": {"window_steps": 4}}))
    [alarm] = [alarm for r in stretch(1, 8, **DEAD) for alarm in alarms.look(r) if alarm.kind == "dying_expert"]
    assert alarm.places == [[1, 2], [1, 3]]
    assert alarm.sentence.startswith("layer 1 expert 2, layer 1 expert 3: dying")

"""Trackers get scalars, histograms and the load as an image; the console draws the load; facts are kept."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from support import runs
from support.training import MODEL, config

from moe_llm.cli import main
from moe_llm.errors import UserError
from moe_llm.train.callbacks.console import BLOCKS, Console, load_map, rate_limit
from moe_llm.train.facts import unusual_kernels
from moe_llm.train.trackers import Wandb, check_trackers, distributions, load_image, scalars

MOE = {
    "tokens_per_expert": [[10, 10, 10, 10], [0, 20, 40, 0]],
    "load_cv": [0.0, 0.9],
    "router_entropy": [1.3, 0.5],
    "dropped_share": [0.0, 0.25],
    "dead_experts": [[], [0, 3]],
    "expert_grad_norm": [[1.0, 2.0, None, 3.0], [1.0] * 4],
}
RECORD = {"step": 7, "tokens": 80, "loss": 1.5, "tokens_per_second": 1000.0, "moe": MOE, "alarms": [{"sentence": "x"}]}


def test_what_is_told_of_a_record():
    told = scalars(RECORD)
    assert told["moe/dropped_share/layer_1"] == 0.25
    assert told["moe/dead_experts"] == 2
    assert told["moe/alarms"] == 1
    spread = distributions(MOE)
    assert spread["moe/load/layer_1"].tolist() == [0.0, 4 / 3, 8 / 3, 0.0]
    assert spread["moe/expert_grad_norm/layer_0"].tolist() == [1.0, 2.0, 3.0]
    image = load_image(MOE["tokens_per_expert"])
    assert image.shape == (24, 48, 3)
    assert image.dtype == np.uint8
    none, most = image[-1, 0], image[-1, 30]
    assert none[2] > none[0], "without tokens: blue"
    assert most[0] > most[2], "far above an even share: orange"
    assert (image[0, 0] == image[11, 47]).all()


def test_tensorboard_files_hold_the_run_and_survive_resuming(make_config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = make_config(logging={"console": "off", "tensorboard": True, "image_every_steps": 4})
    assert main(["train", str(path), "train.max_steps=3"]) == 0
    assert main(["train", str(path)]) == 0
    records = runs.records(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [r["step"] for r in records]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx([r["loss"] for r in records])
    assert {"moe/load/layer_0", "moe/expert_grad_norm/layer_1"} <= set(events.Tags()["histograms"])
    assert [e.step for e in events.Images("moe/load")] == [1, 4]


def test_without_the_package_it_is_refused_before_anything_is_written(make_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(["train", str(make_config(logging={"tensorboard": True}))]) == 2
    assert "logging.tensorboard=true needs the package tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_wandb_gets_pictures_every_so_many_steps(tmp_path, monkeypatch):
    told, axes = [], []
    fake = SimpleNamespace(
        init=lambda **given: SimpleNamespace(
            log=lambda values, step: told.append((step, values)),
            define_metric=lambda name, step_metric: axes.append((name, step_metric)),
        ),
        Error=Exception,
        Histogram=lambda values: ("histogram", len(values)),
        Image=lambda pixels: ("image", pixels.shape),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = Wandb(config(1, 1, 1, logging={"wandb": "offline", "image_every_steps": 5}), tmp_path)
    for step in range(1, 12):
        tracker.write(RECORD | {"step": step})
    assert [step for step, values in told if "moe/load" in values] == [1, 5, 10]
    assert told[0][1]["moe/load"] == ("image", (24, 48, 3))
    assert told[0][1]["moe/load/layer_0"] == ("histogram", 4)
    assert all("train/loss" in values for _, values in told)
    assert axes == [("*", "step")], "the run's own step is the axis"


def test_the_map_folds_many_layers_and_experts_and_shows_the_worst_among_them():
    lines = "".join(text for text, _ in load_map([[10, 10, 10, 10], [0, 20, 40, 0]], columns=8)).splitlines()
    half, full, none = BLOCKS[4], BLOCKS[8], BLOCKS[0]
    assert lines == ["", f"layer 0       {half * 4}", f"layer 1       {none}{BLOCKS[5]}{full}{none}"]
    even = [[10] * 64 for _ in range(32)]
    even[13][40] = 0
    folded = "".join(text for text, _ in load_map(even, columns=32)).splitlines()[1:]
    assert len(folded) == 8
    assert [line.find(none) for line in folded] == [-1, -1, -1, 14 + 20, -1, -1, -1, -1]
    assert folded[3].startswith("layer 12-15 ")
    some = "".join(text for text, _ in load_map(even, columns=32, blocks=range(3, 35))).splitlines()[1:]
    assert some[3].startswith("layer 15-18 "), "of all blocks, of which the first three have no experts"
    assert {colour for text, colour in load_map([[10, 10], [0, 20]], 8) if text in BLOCKS} == {"green", "red", "yellow"}


def test_the_bar_shows_the_share_of_the_limit_and_the_map(monkeypatch):
    from test_reporting import Terminal

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(config(1, 1, 1, logging={"console": "bar"}), 0, limit=4000.0)
    console.update(RECORD | {"val_loss": 2.5}, 9)
    console.update(RECORD, 9)
    console.close()
    shown = terminal.getvalue()
    assert "1,000 tokens/s (25% of the limit)" in shown
    assert "loss 1.5000 · val 2.5000" in shown.split("layer 1")[-2], "the newest validation loss stays"
    assert "layer 1" in shown


@pytest.mark.parametrize(
    ("router", "limit"),
    [({"type": "mixtral"}, 20.0), ({"type": "top_p"}, None), ({"type": "mixtral", "capacity_factor": 1.0}, None)],
)
def test_there_is_no_limit_where_a_tokens_experts_vary(router, limit):
    facts = {"start": {"peak_flops_per_second": 100.0}, "flops_per_token": 5.0}
    assert rate_limit(facts, config(1, 1, 1, model={**MODEL, "router": router})) == limit


def test_facts_of_each_start_are_kept(train):
    run_dir = train(train={"max_steps": 3, "micro_batch_size": 2, "global_batch_size": 4})
    train(train={"max_steps": 6, "micro_batch_size": 2, "global_batch_size": 4})
    facts = json.loads((run_dir / "facts.json").read_text())
    assert [start["step"] for start in facts["starts"]] == [0, 3]
    assert facts["starts"][0]["peak_flops_per_second"] > 0
    assert facts["starts"][0]["versions"]["torch"]
    assert facts["starts"][0]["kernels"]["experts"] == "fused"
    assert facts["starts"][0]["kernels"].keys() == {
        "experts",
        "norm",
        "rotary",
        "loss",
        "documents",
        "compiled",
        "exchange",
    }
    assert facts["parameters"] == sum(facts["parts"].values())
    assert facts["data"][0]["tokens"] > 1000


def test_kernels_are_told_where_they_are_not_the_usual_ones():
    usual = {"experts": "fused", "exchange": "none", "compiled": "nothing", "documents": "one call a document"}
    on_cpus = usual | dict.fromkeys(("norm", "rotary", "loss"), "our own for CPUs")
    assert unusual_kernels(on_cpus, torch.device("cpu")) == {}
    assert unusual_kernels(on_cpus | {"compiled": "between products"}, torch.device("cpu")) == {
        "compiled": "between products"
    }
    assert unusual_kernels(on_cpus | {"exchange": "torch's all-to-all"}, torch.device("cpu")) == {}
    slow = dict.fromkeys(("rotary", "loss"), "torch's elementwise operations")
    assert unusual_kernels(on_cpus | slow, torch.device("cpu")) == slow
    assert unusual_kernels(usual | slow | {"norm": "torch's fused"}, torch.device("cuda")) == {}


def test_names_are_grouped_and_the_step_is_the_axis():
    told = scalars(RECORD | {"val_loss": 2.0, "ema_val_loss": 1.9, "router_drift": {"cosine": [0.1]}, "lr": 0.1})
    assert told["step"] == 7
    assert told["train/loss"] == 1.5
    assert told["train/lr"] == 0.1
    assert told["eval/loss"] == 2.0
    assert told["eval/ema_loss"] == 1.9
    assert told["moe/router_drift/cosine/layer_0"] == 0.1
    assert {name.partition("/")[0] for name in told} == {"step", "tokens", "train", "eval", "moe"}


@pytest.fixture
def wandb_start(tmp_path, monkeypatch):
    """What wandb is started with; nobody has logged in."""

    def start(**logging) -> dict:
        given: dict = {}
        fake = SimpleNamespace(
            init=lambda **arguments: given.update(arguments) or SimpleNamespace(define_metric=lambda *a, **b: None),
            login=lambda prompt, verify: False,
            Error=wandb.Error,
            Settings=wandb.Settings,
        )
        monkeypatch.setitem(sys.modules, "wandb", fake)
        settings = config(1, 1, 1, logging={"wandb": "online", **logging})
        check_trackers(settings)
        Wandb(settings, tmp_path)
        return given

    return start


def test_wandb_online_without_a_login_is_one_sentence(wandb_start):
    with pytest.raises(UserError, match="online needs a login: run `wandb login`"):
        wandb_start()


def test_the_environment_of_wandb_wins_over_defaults(wandb_start, monkeypatch, tmp_path):
    there = {"MODE": "offline", "PROJECT": "theirs", "NAME": "seventh", "RUN_ID": "abc", "DIR": "/elsewhere"}
    for name, value in there.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    given = wandb_start()
    assert {key: given[key] for key in ("mode", "project", "name", "id", "dir")} == {
        "mode": "offline",
        "dir": "/elsewhere",
        "project": "theirs",
        "name": "seventh",
        "id": "abc",
    }
    assert wandb_start(project="ours")["project"] == "ours", "what the configuration says is no default"
    for name in ("PROJECT", "NAME", "RUN_ID"):
        monkeypatch.delenv(f"WANDB_{name}")
    given = wandb_start()
    assert (given["project"], given["name"]) == ("moe_llm", tmp_path.name)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("MODE", "bogus", "Input should be 'online', 'offline'"),
        ("MODE", "", "Input should be"),
        ("TAGS", "", "is empty"),
        ("PROJECT", "a/b", "Invalid project name"),
    ],
)
def test_what_wandb_cannot_read_in_the_environment_is_one_sentence(wandb_start, monkeypatch, name, value, why):
    monkeypatch.setenv(f"WANDB_{name}", value)
    with pytest.raises(
        UserError, match=rf"^WANDB_{name}={value} in the environment cannot be read.*{why}.*unset WANDB_{name}$"
    ):
        wandb_start()


def test_a_projects_name_that_wandb_refuses_is_refused_before_training(wandb_start):
    with pytest.raises(UserError, match=r"^logging.project=a/b cannot be read by wandb \(Invalid project name"):
        wandb_start(project="a/b", wandb="offline")

"""`moe-llm plan`: its arithmetic against measurement and against sums done by hand."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.ranks import fresh_accelerate

from moe_llm import cli
from moe_llm.config import load_config
from moe_llm.errors import UserError
from moe_llm.planner.memory import KERNELS, Layout, layout_of, step_memory
from moe_llm.planner.plan import Request, hardware_named, layouts, plan, planned_config
from moe_llm.planner.time import step_time, traffic

ROOT = Path(__file__).parents[2]
MIXTRAL = str(ROOT / "configs/mixtral_8x7b.yaml")
GIB = 2**30


def request_for(gpus: int, memory: float = 80 * GIB, nodes: int | None = None) -> Request:
    return Request(gpus=gpus, nodes=nodes or -(-gpus // 8), memory=memory, hardware=hardware_named("h100"))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts/benchmarks"))
    import plan_memory

    yield plan_memory
    sys.modules.pop("plan_memory")


@pytest.mark.parametrize(
    ("name", "smaller"),
    [
        ("fp32, many tokens", ["train.micro_batch_size=8", "train.global_batch_size=8"]),
        ("bf16, recomputed, long", ["model.num_hidden_layers=3", "data.sequence_length=512"]),
        ("bf16, mixed weights", ["model.num_hidden_layers=2"]),
    ],
)
def test_memory_is_within_15_percent_of_what_is_measured(script, name, smaller):
    fresh_accelerate()
    ranks, overrides = script.CASES[name]
    assert ranks == 1
    config = script.configuration([*overrides, *smaller])
    assert script.predicted(config, 1) == pytest.approx(script.measured(config), rel=script.TOLERANCE)


def test_mixtral_8x7b_on_64_gpus_by_hand():
    found = plan(load_config(MIXTRAL), request_for(64))
    best = found.best
    assert best.layout.expert_parallel == 8
    dense = 2 * 32000 * 4096 + 32 * (2 * 4096 * 128 * (32 + 8) + 8 * 4096) + 65 * 4096
    expert = 32 * 3 * 4096 * 14336
    layout = Layout(64, 8, 2, 1, True)
    parts = step_memory(found.config, layout, KERNELS["cuda"], 1.5).parts
    assert parts["weights"] == 2 * (dense + expert)
    assert parts["optimizer"] == 12 * (dense / 64 + expert / 8)
    # rows to their expert and back, 32 layers, forward, again, backward; 7 of 8 elsewhere; bf16
    tokens = 1024 * 4096 / 64
    sent = traffic(found.config, layout)
    assert sent.all_to_all == pytest.approx(6 * 32 * tokens * 2 * 4096 * 2 * 7 / 8)
    # fp32 gradients to their owners in each of 16 micro-batches
    assert sent.gradients == pytest.approx(16 * 4 * (dense * 63 / 64 + expert * 7 / 8))


def test_mixed_weights_travel_instead_of_rows():
    config = load_config(ROOT / "configs/routing/lory.yaml", ["train.micro_batch_size=2"])
    sent = [traffic(config, Layout(2, 2, 1, micro, False)).all_to_all for micro in (2, 4)]
    weights = 4 * config.model.parameter_counts()["experts"]
    assert sent == [4 * 3 * weights / 2, 2 * 3 * weights / 2]  # forward, backward, gradients, of each micro-batch


def test_what_fits_is_what_is_within_the_memory_and_the_best_is_the_fastest_of_it():
    found = plan(load_config(MIXTRAL), request_for(64))
    assert all(c.fits == (c.memory.total <= found.request.usable) for c in found.candidates)
    fitting = [c for c in found.candidates if c.fits]
    assert 0 < len(fitting) < len(found.candidates)
    assert found.best.time.total == min(c.time.total for c in fitting)


def test_what_is_impossible_is_answered_with_what_would_do():
    config = load_config(MIXTRAL)
    found = plan(config, request_for(8))
    assert found.best is None
    larger, more, shallower = found.needed
    size = float(larger.split(" GPUs of ")[1].split()[0])
    assert plan(config, request_for(8, (size + 1) * GIB)).best is not None
    assert plan(config, request_for(8, (size - 2) * GIB)).best is None
    gpus = int(more.split()[0])
    assert gpus > 8
    assert plan(config, request_for(gpus)).best is not None
    layers = int(shallower.split("=")[1].split()[0])
    fits = [
        plan(load_config(MIXTRAL, [f"model.num_hidden_layers={n}"]), request_for(8)).best for n in (layers, layers + 1)
    ]
    assert [best is not None for best in fits] == [True, False]


def test_more_of_anything_takes_more():
    config, layout = load_config(MIXTRAL), Layout(64, 8, 2, 1, False)
    base = step_memory(config, layout, KERNELS["cuda"], 1.0).total
    assert step_memory(config, replace(layout, micro_batch=2), KERNELS["cuda"], 1.0).total > base
    assert step_memory(config, replace(layout, recompute=True), KERNELS["cuda"], 1.0).total < base
    assert step_memory(config, layout, KERNELS["cuda"], 2.0).total > base
    assert step_memory(config, replace(layout, zero_stage=1), KERNELS["cuda"], 1.0).total > base
    slow, fast = (step_time(config, layout, hardware_named(name), 8, 0.4) for name in ("a100", "h100"))
    assert slow.products / fast.products == pytest.approx(989.4 / 312)
    across = step_time(config, layout, hardware_named("h100"), 4, 0.4)
    within = step_time(config, layout, hardware_named("h100"), 8, 0.4)
    assert across.all_to_all == pytest.approx(within.all_to_all * (0.5 + 0.5 * 450 / 50))


def test_layouts_can_be_launched():
    config = load_config(MIXTRAL)
    for layout in layouts(config, 16):
        planned_config(config, layout).check_layout(16)
    assert {layout.expert_parallel for layout in layouts(config, 12)} == set()  # 1024 does not divide by 12


def test_the_written_configuration_is_the_best_layout(tmp_path, capsys):
    out = tmp_path / "best.yaml"
    argv = ["plan", MIXTRAL, "--gpus", "64", "--gpu-memory", "80GiB", "--nodes", "8", "--json", "--out", str(out)]
    assert cli.main(argv) == 0
    best = json.loads(capsys.readouterr().out)["best"]
    config = load_config(out)
    config.check_layout(64)
    layout = layout_of(config, 64)
    assert layout == Layout(*(best[key] for key in Layout.__dataclass_fields__))
    assert step_memory(config, layout, KERNELS["cuda"], 1.5).total == best["memory"]["total"]
    assert config.model == load_config(MIXTRAL).model
    assert cli.main(["params", str(out)]) == 0
    assert "--num_processes 64" in out.read_text()
    assert cli.main(argv) == 2  # it is not overwritten


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gpus", "12", "--gpu-memory", "80GiB", "--nodes", "1"], "train.global_batch_size=1032"),
        (["--gpus", "8", "--gpu-memory", "80GiB", "--nodes", "3"], "--nodes 3"),
        (["--gpus", "8", "--gpu-memory", "80GiB", "model.vocab_size=null", "tokenizer.path=x"], "model.vocab_size"),
        (["--gpus", "8", "--gpu-memory", "80GiB", "finetune.trainable=router"], "finetune.trainable=router"),
        (["--gpus", "8", "--gpu-memory", "80GiB", "--imbalance", "0.5"], "--imbalance 0.5"),
        (["--gpus", "8", "--gpu-memory", "80GiB", "--out", "/nowhere/x.yaml"], "--out"),
    ],
)
def test_mistakes_are_one_sentence(argv, words, capsys):
    assert cli.main(["plan", MIXTRAL, *argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


@pytest.mark.parametrize("guard", ["{action: regularise, coefficient: 1}", "{action: freeze}"])
def test_a_guard_that_changes_what_is_trained_is_refused(guard):
    config = load_config(MIXTRAL, ["model.init_from=x", f"finetune.router_guard={guard}"])
    with pytest.raises(UserError, match=r"finetune\.router_guard\.action=off"):
        plan(config, request_for(64))


@pytest.mark.parametrize("size", ["80", "80GiBs", "0GiB", "much"])
def test_sizes_that_are_none(size, capsys):
    if size == "80":  # bytes: legal, and nothing fits
        assert cli.main(["plan", MIXTRAL, "--gpus", "8", "--gpu-memory", size]) == 1
        assert "no layout fits" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit):
        cli.main(["plan", MIXTRAL, "--gpus", "8", "--gpu-memory", size])
    assert "write it like 80GiB" in capsys.readouterr().err


def test_planning_loads_no_torch():
    code = (
        "import sys, moe_llm.cli as cli\n"
        f"assert cli.main(['plan', {MIXTRAL!r}, '--gpus', '64', '--gpu-memory', '80GiB']) == 0\n"
        "print('LOADED', sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("LOADED []\n")

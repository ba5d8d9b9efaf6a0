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
from moe_llm.planner.layout import Layout, layout_of, trained_parameters
from moe_llm.planner.memory import KERNELS, step_memory
from moe_llm.planner.plan import Request, hardware_named, layouts, plan, planned_config
from moe_llm.planner.report import format_plan
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
def test_memory_is_within_10_percent_of_what_is_measured(script, name, smaller):
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
    narrow = found.config.optim.model_copy(update={"name": "adamw_8bit"})
    eight_bits = found.config.model_copy(update={"optim": narrow})  # moments, with a maximum for each 256 elements
    of_embeddings = 32000 * 4096 / 64
    moments = (2 + 2 * 4 / 256) * (dense / 64 + expert / 8 - of_embeddings) + 8 * of_embeddings
    counted = step_memory(eight_bits, layout, KERNELS["cuda"], 1.5).parts["optimizer"]
    assert counted == pytest.approx(4 * (dense / 64 + expert / 8) + moments)
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


NODE = ["train.global_batch_size=64"]


def test_what_is_impossible_is_answered_with_what_would_do():
    config = load_config(MIXTRAL, NODE)
    request = replace(request_for(8, 40 * GIB), host_memory=100 * GIB)
    found = plan(config, request)
    assert found.best is None
    larger, more, *_, shallower = found.needed
    size = float(larger.split(" GPUs of ")[1].split()[0])
    assert plan(config, replace(request, memory=(size + 1) * GIB)).best is not None
    assert plan(config, replace(request, memory=(size - 2) * GIB)).best is None
    gpus = int(more.split()[0])
    assert gpus > 8
    layers = int(shallower.split("=")[1].split()[0])
    fits = [
        plan(load_config(MIXTRAL, [*NODE, f"model.num_hidden_layers={n}"]), request).best for n in (layers, layers + 1)
    ]
    assert [best is not None for best in fits] == [True, False]


LORA = "finetune.lora={rank: 16, targets: [attention, experts]}"


@pytest.mark.parametrize(
    ("overrides", "offloaded"),
    [([], True), (["model.init_from=x", "finetune.trainable=experts"], True), (["model.init_from=x", LORA], False)],
)
def test_one_node_of_8_x_80_gb_trains_mixtral_8x7b(overrides, offloaded):
    config = load_config(MIXTRAL, [*NODE, *overrides])
    found = plan(config, replace(request_for(8), host_memory=1500 * GIB))
    assert found.best is not None
    assert found.best.layout.offload == offloaded
    text = format_plan(found)
    assert ("host memory of each machine" in text) == offloaded
    dense, expert = 1_605_636_096, 45_097_156_608
    if not overrides:  # masters, two moments and gradients, in fp32
        assert found.best.memory.host == 16 * (dense / 8 + expert / 8)
    elif not offloaded:
        best = found.best
        factors = trained_parameters(config, best.layout)
        assert factors.expert == 32 * 8 * 16 * (4096 + 2 * 14336 + 14336 + 4096) / best.layout.expert_parallel
    poor = plan(config, replace(request_for(8), host_memory=130 * GIB))
    assert (poor.best is None) == offloaded
    assert any("of host memory in each machine" in way for way in poor.needed) == offloaded


def test_frozen_parts_have_neither_gradients_nor_optimizer_tensors():
    layout = Layout(8, 8, 1, 1, True)
    whole, experts = (
        step_memory(load_config(MIXTRAL, [*NODE, *more]), layout, KERNELS["cuda"]).parts
        for more in ([], ["model.init_from=x", "finetune.trainable=experts"])
    )
    assert whole["weights"] == experts["weights"]
    assert whole["optimizer"] - experts["optimizer"] == 12 * 1_605_636_096 / 8
    assert whole["gradients"] - experts["gradients"] >= 4 * 1_605_636_096


def test_the_start_is_counted_on_the_device_and_on_the_host():
    """ZeRO-3 makes and shares out one parameter at a time; the other stages make all that a rank holds on its host."""
    config = load_config(MIXTRAL, NODE)
    dense, expert = 1_605_636_096, 45_097_156_608
    largest = 2 * 4096 * 14336  # of an expert: gate and up
    shared_out = step_memory(config, Layout(8, 1, 3, 1, True, True), KERNELS["cuda"])
    assert shared_out.host_at_start == 2 * 8 * largest
    assert shared_out.total < 2 * (dense + expert) / 3
    whole = step_memory(config, Layout(8, 8, 2, 1, True, True), KERNELS["cuda"])
    assert whole.host_at_start == 2 * (dense + expert / 8)
    found = plan(config, replace(request_for(8), host_memory=1500 * GIB))
    assert "at the start a machine holds" in format_plan(found)


def test_selective_recomputation_is_a_layout_of_its_own():
    """It keeps more than full recomputation and exchanges less."""
    config = load_config(MIXTRAL, NODE)
    full, selective, off = (
        Layout(8, 8, 2, 8, recompute, True, kind) for recompute, kind in ((True, False), (True, True), (False, False))
    )
    held = [step_memory(config, layout, KERNELS["cuda"]).total for layout in (full, selective, off)]
    assert held[0] < held[1] < held[2]
    sent = [traffic(config, layout).all_to_all for layout in (full, selective, off)]
    assert sent[0] == pytest.approx(1.5 * sent[1])
    assert sent[1] == sent[2]
    assert planned_config(config, selective).train.activation_checkpointing == "selective"
    asked = load_config(MIXTRAL, [*NODE, "train.activation_checkpointing=selective"])
    assert layout_of(asked, 8).selective


LONG = ["data.sequence_length=131072", "model.max_position_embeddings=131072", "train.global_batch_size=8"]


def test_128k_tokens_of_mixtral_8x7b_fit_8_gpus_of_80_gb_where_ranks_share_sequences():
    config = load_config(MIXTRAL, LONG)
    found = plan(config, replace(request_for(8), host_memory=1500 * GIB))
    assert found.best is not None
    assert found.best.layout.sequence_parallel > 1
    assert not any(c.fits for c in found.candidates if c.layout.sequence_parallel == 1)
    shared = planned_config(config, found.best.layout)
    assert shared.parallel.sequence_parallel_size == found.best.layout.sequence_parallel
    one, eight = (
        step_memory(config, Layout(8, 8, 2, 1, True, True, False, size), KERNELS["cuda"]).parts["activations"]
        for size in (1, 8)
    )
    assert eight == pytest.approx(one / 8, rel=0.05)


def test_the_busiest_rank_sets_the_time():
    config, layout = load_config(MIXTRAL), Layout(64, 8, 2, 1, False)
    even, uneven = (step_time(config, layout, hardware_named("h100"), 8, 0.4, skew) for skew in (1.0, 2.0))
    assert uneven.all_to_all == pytest.approx(2 * even.all_to_all)
    assert 1.5 * even.products < uneven.products < 2 * even.products, "the experts are most of the products"
    local = replace(layout, expert_parallel=1)
    even, uneven = (step_time(config, local, hardware_named("h100"), 8, 0.4, skew) for skew in (1.0, 2.0))
    assert even == uneven


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
        (["--gpus", "8", "--gpu-memory", "80GiB", "finetune.trainable=[x]"], "finetune.trainable='x'"),
        (["--gpus", "8", "--gpu-memory", "80GiB", "--imbalance", "0.5"], "--imbalance 0.5"),
        (["--gpus", "8", "--gpu-memory", "80GiB", "--out", "/nowhere/x.yaml"], "--out"),
    ],
)
def test_mistakes_are_one_sentence(argv, words, capsys):
    assert cli.main(["plan", MIXTRAL, *argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


def test_a_guard_with_passes_of_its_own_is_refused():
    guard = "finetune.router_guard={action: regularise, coefficient: 1}"
    config = load_config(MIXTRAL, ["model.init_from=x", guard])
    with pytest.raises(UserError, match=r"finetune\.router_guard\.action=regularise"):
        plan(config, request_for(64))


@pytest.mark.parametrize("size", ["80", "80GiBs", "0GiB", "much"])
def test_sizes_without_a_unit_or_that_are_none_are_refused(size, capsys):
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


def test_recorded_loads_give_each_layout_its_imbalance_before_and_after_moves(tmp_path, capsys):
    """Experts 0 to 3 have 3 of 4 rows: with neighbours together one of two ranks has them all, and moved ones share."""
    loads = [[3.0, 3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0]] * 32
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "tokens": 9, "moe": {"tokens_per_expert": loads}}) + "\n"
    )
    arguments = ["plan", MIXTRAL, "model.vocab_size=32000", "--gpus", "64", "--gpu-memory", "80GiB"]
    seconds = {}
    for placement in ("static", "dynamic"):
        more = ["--loads", str(tmp_path), f"parallel.placement={placement}"]
        cli.main([*arguments, *more])
        told = capsys.readouterr().out
        assert "EP 2: 1.50 with neighbours together, 1.00 where experts have moved" in told
        assert f"parallel.placement={placement} is planned" in told
        cli.main([*arguments, *more, "--json"])
        rows = json.loads(capsys.readouterr().out)["candidates"]
        seconds[placement] = min(row["seconds"]["products"] for row in rows if row["expert_parallel"] == 2)
    assert seconds["dynamic"] < 0.85 * seconds["static"]
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "tokens": 9, "moe": {"tokens_per_expert": loads[:3]}}) + "\n"
    )
    assert cli.main([*arguments, "--loads", str(tmp_path)]) == 2
    assert "--loads has 3 layers of 8 experts, and the configuration 32 of 8" in capsys.readouterr().err
    assert cli.main([*arguments, "--loads", str(tmp_path / "none")]) == 2
    assert "has no record of experts' loads" in capsys.readouterr().err


def test_files_take_masters_and_moments_out_of_host_memory():
    dense, expert = 1_605_636_096, 45_097_156_608
    shard = dense / 8 + expert / 8
    poor = replace(request_for(8), host_memory=250 * GIB)
    refused = plan(load_config(MIXTRAL, NODE), poor)
    assert refused.best is None
    [way] = [sentence for sentence in refused.needed if "nvme" in sentence]
    assert way.startswith(
        "parallel.offload_optimizer=nvme, with 174 GiB of host memory and 522 GiB of disk in each machine"
    )
    mapped = ["parallel.offload_optimizer=nvme", "parallel.nvme_path=/nvme"]
    found = plan(load_config(MIXTRAL, [*NODE, *mapped]), poor)
    assert found.best is not None
    assert (found.best.memory.host, found.best.memory.disk) == (4 * shard, 12 * shard)
    text = format_plan(found)
    assert "host memory of each machine: 174 GiB for gradients" in text
    assert "disk of each machine: 522 GiB in /nvme for masters and moments" in text
    parallel = planned_config(found.config, found.best.layout).parallel
    assert (parallel.offload_optimizer, parallel.nvme_path) == ("nvme", "/nvme")
    rich = plan(load_config(MIXTRAL, NODE), replace(poor, host_memory=1500 * GIB))
    assert rich.best is not None
    assert found.best.time.host > 2 * rich.best.time.host, "a drive is slower than memory"
    narrow = plan(load_config(MIXTRAL, [*NODE, *mapped, "optim.name=adamw_8bit"]), request_for(8)).candidates
    assert any(c.memory.disk for c in narrow), "moments of 8 bits stay in memory, and masters do not"
    for candidate in narrow:
        if candidate.layout.nvme:
            assert candidate.memory.disk < candidate.memory.host

"""The products are the step's arithmetic, the parts its time, and a mistake one sentence."""

import json
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from support.runs import environment
from support.training import config as training_config

from moe_llm import cli
from moe_llm.bench.parts import PARTS, events_by_part, marked
from moe_llm.bench.products import ProductShape, Scores, flops, measure_products, step_products
from moe_llm.bench.run import bench, format_report, synthetic_loader
from moe_llm.config import load_config
from moe_llm.config.load import dump_config
from moe_llm.distributed.runtime import Runtime
from moe_llm.errors import UserError
from moe_llm.model.flops import train_flops_per_token
from moe_llm.model.init import build_model
from moe_llm.ops import native
from moe_llm.ops.products import fused_experts_fit

CPU = torch.device("cpu")


def test_flops_of_the_products_are_those_of_the_model():
    model = training_config(2, 1, 1).model
    rows = 3 * 16 * model.num_experts_per_tok // model.num_local_experts
    counts = [[rows] * model.num_local_experts] * model.num_hidden_layers
    total = sum(map(flops, step_products(model, 3, 16, counts)))
    assert total == pytest.approx(3 * 16 * train_flops_per_token(model, 16), rel=1e-9)


def test_documents_leave_less_to_attend_to():
    model = training_config(2, 1, 1).model
    whole, cut = (step_products(model, 2, 64, [], visible=visible) for visible in (None, 16))
    scores = [next(p for p in products if isinstance(p, Scores)) for products in (whole, cut)]
    assert flops(scores[1]) == flops(scores[0]) / 4


def test_measured_products_have_their_flops_and_take_time():
    limits = measure_products(
        [ProductShape("a", 8, 4, 6), ProductShape("a", 8, 4, 6), Scores("b", 2, 8, 4)], torch.float32, CPU
    )
    assert limits["a"].flops == 2 * 6 * 8 * 4 * 6
    assert limits["b"].flops == 6 * 2 * 8 * 8 * 4
    assert all(limit.seconds > 0 for limit in limits.values())


def test_batches_read_as_training_reads_them():
    config = training_config(2, 3, 1)
    with synthetic_loader(config, Runtime(None, CPU, 0, 1, False), 4) as loader:
        steps = [next(loader) for _ in range(4)]
    assert [len(step) for step in steps] == [3] * 4
    for batch in (batch for step in steps for batch in step):
        assert batch.input_ids_BS.shape == (2, config.data.sequence_length)
        assert batch.input_ids_BS.max() < config.model.vocab_size
    assert not torch.equal(steps[0][0].input_ids_BS, steps[1][0].input_ids_BS)


def experts_kernel(dtype):
    """The kernel that a backward pass through experts calls."""
    in_one_call = fused_experts_fit(torch.empty(1, 2, dtype=dtype), 2)
    return "moe_llm::experts_backward" if in_one_call else "moe_llm::swiglu_backward"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_report(precision, tmp_path):
    config = training_config(2, 2, 1, optimizer="adamw", train={"precision": precision})
    plain = native.call
    report = bench(config, steps=2, trace=tmp_path / "trace.json")
    assert native.call is plain
    assert report["tokens_per_second"] == pytest.approx(config.tokens_per_step / report["seconds"])
    assert set(report["parts"]) == set(PARTS)
    assert sum(part["share"] for part in report["parts"].values()) == pytest.approx(1)
    for part in ("attention", "router", "experts", "norms", "loss", "optimizer", "data"):
        assert report["parts"][part]["seconds"] > 0, part
    assert report["parts"]["communication"]["seconds"] == 0
    assert report["products_seconds"] > 0
    table = format_report(report)
    assert all(part in table for part in PARTS)
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {"part:experts", experts_kernel(dtype), "_FusedExpertsBackward"} <= names


def test_backward_work_is_given_to_the_part_that_asked_for_it():
    """Each operation that only one part does, backward, belongs to that part."""
    model = build_model(training_config(2, 1, 1).model, seed=0)
    ids_BS = torch.randint(model.config.vocab_size, (2, 16))
    with native.recorded(), marked(model), torch.profiler.profile() as profile:
        output = model(ids_BS, labels=ids_BS)
        (output.loss + output.z_loss).backward()
    parts = defaultdict(set)
    for event, part in events_by_part(profile):
        parts[event.name].add(part)
    assert parts["_FusedExpertsBackward"] == {"experts"}
    assert parts[experts_kernel(torch.float32)] == {"experts"}
    assert parts["LogsumexpBackward0"] == {"router"}
    assert "norms" in parts["_RMSNormBackward"]


def test_without_a_vocabulary_or_a_place_for_the_trace(tmp_path, capsys):
    config = training_config(2, 1, 1)
    with pytest.raises(UserError, match=r"model\.vocab_size=null"):
        bench(config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": None})}))
    with pytest.raises(UserError, match="cannot be written"):
        bench(config, trace=tmp_path / "missing" / "trace.json")


def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    seen = {}

    def fake(config, **options):
        seen.update(options, hidden=config.model.hidden_size)
        return {"seconds": 1.0}

    monkeypatch.setattr("moe_llm.bench.run.bench", fake)
    quickstart = load_config.__globals__["__file__"].replace("moe_llm/config/load.py", "configs/quickstart.yaml")
    assert cli.main(["bench", quickstart, "--steps", "3", "--json", "model.hidden_size=96"]) == 0
    assert seen == {"steps": 3, "trace": None, "hidden": 96}
    assert json.loads(capsys.readouterr().out) == {"seconds": 1.0}


def test_json_is_all_that_stands_on_stdout_whatever_deepspeed_says(tmp_path):
    """In a process of its own, for libraries write to the descriptor."""
    config = training_config(2, 1, 1)
    (tmp_path / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "moe_llm.cli", "bench", str(tmp_path / "run.yaml"), "--steps", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)

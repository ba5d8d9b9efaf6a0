"""What a user of `moe-llm doctor` sees, for configurations that are sound."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.ci import dear_by_id

from moe_llm import cli
from moe_llm.config import load_config
from moe_llm.doctor import examine as examination
from moe_llm.doctor.examine import Report, examine
from moe_llm.doctor.findings import Finding, exact, note, within
from moe_llm.doctor.report import as_json, print_report
from moe_llm.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")


def test_the_quickstart_passes_and_leaves_nothing_behind(doctor_ranks, tmp_path, monkeypatch, capsys):
    doctor_ranks.run(os.getpid)  # they have started, with files of their own elsewhere
    monkeypatch.setattr(examination, "LocalRanks", lambda ranks: contextlib.nullcontext(doctor_ranks))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli.main(["doctor", QUICKSTART, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["passed"]
    assert {check["status"] for check in report["checks"]} == {"PASS"}
    assert "doctor: training on 2 ranks" in err
    # torch makes an empty cache of its own when it is imported
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")] == []


def test_when_told_to_stop_it_leaves_neither_ranks_nor_files(tmp_path):
    command = [sys.executable, "-m", "moe_llm.cli", "doctor", QUICKSTART]
    process = subprocess.Popen(
        command, env={**os.environ, "TMPDIR": str(tmp_path)}, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert "preparing" in process.stderr.readline()
    assert list(tmp_path.glob("moe-llm-doctor-*"))
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said
    assert not list(tmp_path.glob("moe-llm-doctor-*"))


VARIANTS = {
    "bf16, ZeRO-3, recomputation, accumulation": [
        "train.precision=bf16",
        "parallel.zero_stage=3",
        "parallel.expert_parallel_size=2",
        "checkpoint.dtype=bf16",
        "train.activation_checkpointing=true",
        "train.global_batch_size=64",
    ],
    "sgd, ties, window, packed without isolation": [
        "optim.name=sgd",
        "optim.lr=0.1",
        "model.tie_word_embeddings=true",
        "model.sliding_window=64",
        "data.isolate_documents=false",
        "parallel.zero_stage=2",
        "parallel.expert_parallel_size=2",
    ],
    "moments of 8 bits, blocks that ranks cut": ["optim.name=adamw_8bit", "parallel.expert_parallel_size=2"],
    "transformers' balance loss, accumulation, no clipping": [
        "model.router_aux_loss_scope=transformers",
        "train.global_batch_size=64",
        "optim.grad_clip=0",
        "model.head_dim=48",
        "parallel.zero_stage=3",
    ],
    "capacity, saving in the background": [
        "model.router.capacity_factor=1.0",
        "checkpoint.async=true",
        "parallel.expert_parallel_size=2",
    ],
    "two experts at random, entropies, warm-up": [
        "model.router={type: gshard, entropy_bonus_coef: 0.01, global_entropy_coef: 0.01, warmup_steps: 9}",
        "parallel.expert_parallel_size=2",
    ],
    "optimizer and activations in host memory, tiles": [
        "parallel.offload_optimizer=cpu",
        "parallel.zero_stage=2",
        "parallel.expert_parallel_size=2",
        "train.activation_checkpointing=selective",
        "train.activation_offload=true",
        "train.tiled_mlp=2",
    ],
    "optimizer in files, an average, ZeRO-3": [
        "parallel.offload_optimizer=nvme",
        f"parallel.nvme_path={tempfile.gettempdir()}",
        "parallel.zero_stage=3",
        "parallel.expert_parallel_size=2",
        "checkpoint.ema.decay=0.9",
    ],
    "bf16 weights by stochastic rounding, bf16 gradients": [
        "train.precision=bf16",
        "optim.master_weights=stochastic_rounding",
        "parallel.gradient_dtype=bf16",
        "parallel.expert_parallel_size=2",
    ],
    "bf16 weights with Kahan sums, ZeRO-3": [
        "train.precision=bf16",
        "optim.master_weights=kahan",
        "parallel.gradient_dtype=bf16",
        "parallel.zero_stage=3",
        "parallel.expert_parallel_size=2",
    ],
    "losses and noise of the router's own": [
        "model.router.type=noisy_top_k",
        "parallel.expert_parallel_size=2",
        "parallel.zero_stage=3",
    ],
    "low-rank adapters, ZeRO-3": [
        "finetune.lora={rank: 8, alpha: 4, dropout: 0.1, targets: [attention, experts, router]}",
        "parallel.zero_stage=3",
        "parallel.expert_parallel_size=2",
        "optim.lr=0.02",
    ],
    "experts that choose, perturbed embeddings, routers in turns": [
        "model.router.type=expert_choice",
        "train.adversarial={epsilon: 0.05, steps: 2, router_every: 3}",
        "parallel.expert_parallel_size=2",
        "parallel.zero_stage=2",
    ],
    "ranks that share sequences, ZeRO-3, capacity": [
        "parallel.sequence_parallel_size=2",
        "parallel.expert_parallel_size=2",
        "parallel.zero_stage=3",
        "model.router.capacity_factor=1.0",
        "train.global_batch_size=64",
    ],
    "capacity passed on, balance by sequence, accumulation": [
        "model.router.capacity_factor=1.0",
        "model.router.overflow=next",
        "model.router_aux_loss_scope=sequence",
        "train.global_batch_size=64",
    ],
}


IN_CI = (
    "bf16, ZeRO-3, recomputation, accumulation",
    "losses and noise of the router's own",
)


@pytest.mark.parametrize("overrides", dear_by_id(VARIANTS, IN_CI).values(), ids=VARIANTS)
def test_features_pass(doctor_ranks, overrides):
    report = examine(load_config(QUICKSTART, overrides), steps=2, processes=doctor_ranks)
    assert [finding for finding in report.findings if finding.failed] == []


def test_it_starts_its_ranks_itself(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="run it without a launcher"):
        examine(load_config(QUICKSTART))


def sick() -> Report:
    found = [
        note("something to know"),
        exact("samples", "blocks", []),
        within("gradients", "gradients", [(1e-7, 1e-5, "a"), (math.inf, 1e-5, "b.weight")], kinds=["dense"]),
    ]
    found[-1].cause = "a [bold] guess"
    changes = {"model.hidden_size": (256, 64), "model.rope_parameters": ({"factor": 2.0}, {"factor": 3.0})}
    return Report("2 ranks", changes, found, 1.25)


@pytest.mark.parametrize(("report", "code"), [(sick(), 1), (Report("2 ranks", {}), 0)])
@pytest.mark.parametrize("json_asked", [[], ["--json"]])
def test_the_exit_code_says_whether_all_is_well(monkeypatch, report, code, json_asked, capsys):
    calls = []
    monkeypatch.setattr(examination, "examine", lambda *a, **k: calls.append((a, k)) or report)
    assert cli.main(["doctor", QUICKSTART, "run.seed=7", "--ranks", "4", "--steps", "3", *json_asked]) == code
    (((config,), options),) = calls
    assert config == load_config(QUICKSTART, ["run.seed=7"])
    assert (options["ranks"], options["steps"]) == (4, 3)
    assert capsys.readouterr().out


def test_a_mistake_in_the_configuration_has_code_2():
    assert cli.main(["doctor", QUICKSTART, "model.hiden_size=3"]) == 2


@pytest.mark.parametrize("arguments", [["--ranks", "1"], ["--steps", "1"], ["--ranks", "two"]])
def test_it_needs_two_ranks_and_two_steps(arguments):
    with pytest.raises(SystemExit) as done:
        cli.main(["doctor", QUICKSTART, *arguments])
    assert done.value.code == 2


def test_a_failure_names_where_and_why(capsys):
    print_report(sick())
    out = capsys.readouterr().out
    for words in (
        "in small: width 256 -> 64 (--json has every change)",
        "note: something to know",
        "FAIL gradients: b.weight",
        "likely: a [bold] guess",
        "1 of 2 checks fail",
    ):
        assert words in out
    assert "rope_parameters" not in out
    assert json.loads(json.dumps(as_json(sick()), allow_nan=False))["checks"][2]["difference"] is None


def test_no_number_is_not_within_a_tolerance():
    assert within("x", "x", [(math.nan, 1.0, "here")]).failed
    assert within("x", "x", [(0.5, 1.0, "here"), (0.2, 0.1, "there")]).where == "there"
    assert not within("x", "x", [(0.0, 0.0, "here")]).failed
    assert exact("x", "x", ["one", "two"]).where == "one, and 1 more"
    assert not Finding("x", "x", "NOTE").failed

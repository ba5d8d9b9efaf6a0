"""No option that does nothing: each key changes what it says, and only where it says so."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import runs
from support.training import config, train_steps

from moe_llm.cli import main
from moe_llm.inference.generate import generate

SHORT = {
    "train": {"max_steps": 4, "micro_batch_size": 2, "global_batch_size": 4},
    "checkpoint": {"every_steps": None},
    "optim": {"lr": 3e-3, "schedule": "constant"},
    "logging": {"console": "off"},
}


@pytest.fixture(scope="module")
def plain(corpus, cache, tmp_path_factory):
    """The run that the others are compared with."""
    root = tmp_path_factory.mktemp("plain")
    raw = runs.sections(corpus, cache, root / "run", **SHORT)
    assert main(["train", str(runs.write_yaml(root / "plain.yaml", raw))]) == 0
    return root / "run"


@pytest.fixture
def train_with(make_config, tmp_path):
    """The run of `plain` with overrides."""

    def run(*overrides: str):
        assert main(["train", str(make_config(**SHORT)), *overrides]) == 0
        return tmp_path / "run"

    return run


@pytest.mark.parametrize(
    "overrides",
    [
        "run.seed=6", "data.isolate_documents=false", "data.sequence_length=16", "data.validation_fraction=0.3",
        "optim.name=sgd", "optim.lr=1e-3", "optim.betas=[0.5,0.95]", "optim.betas=[0.9,0.5]", "optim.eps=1e-2",
        "optim.weight_decay=5", "optim.grad_clip=0.01 optim.eps=1e-2", "optim.schedule=cosine",
        "optim.schedule=wsd optim.decay_ratio=1", "optim.warmup_steps=2", "train.precision=bf16",
        "train.global_batch_size=8", "model.router_aux_loss_coef=1", "model.router_z_loss_coef=1",
        "model.router_jitter_noise=0.9", "model.rope_theta=100", "model.sliding_window=2", "model.rms_norm_eps=0.1",
        "model.initializer_range=0.2", "model.num_experts_per_tok=1", "model.tie_word_embeddings=true",
        "model.head_dim=4", "model.num_key_value_heads=2", "tokenizer.train_bytes=5000",
        "model.expert_dropout=0.5",
    ],
)  # fmt: skip
def test_what_decides_the_learning_changes_the_losses(overrides, train_with, plain):
    losses = [r["lm_loss"] for r in runs.records(train_with(*overrides.split()))]
    expected = [r["lm_loss"] for r in runs.records(plain)]
    assert len(losses) == len(expected)
    assert losses[-1] != expected[-1]
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    "overrides",
    [
        "train.activation_checkpointing=true", "train.device=auto", "checkpoint.every_steps=1", "checkpoint.dtype=bf16",
        "checkpoint.max_shard_size=10KB", "data.num_workers=2", "parallel.zero_stage=3",
    ],
)  # fmt: skip
def test_what_is_about_the_machine_does_not(overrides, train_with, plain):
    found, expected = runs.records(train_with(*overrides.split())), runs.records(plain)
    assert [r["loss"] for r in found] == [r["loss"] for r in expected]
    assert [r["grad_norm"] for r in found] == [r["grad_norm"] for r in expected]
    assert found[-1]["val_loss"] == expected[-1]["val_loss"]


def test_the_balance_loss_of_transformers_is_another_one(train_with, plain):
    found, expected = (runs.records(d)[0] for d in (train_with("model.router_aux_loss_scope=transformers"), plain))
    assert found["lm_loss"] == expected["lm_loss"]
    assert found["aux_loss"] != expected["aux_loss"]


def test_floors_of_the_schedules_reach_the_records(train_with):
    records = runs.records(train_with("optim.schedule=wsd", "optim.decay_ratio=0.5", "optim.min_lr_ratio=0.5"))
    assert [r["lr"] for r in records] == pytest.approx([3e-3, 3e-3, 3e-3, 3e-3 * 0.75])


def test_max_tokens_is_rounded_up_to_whole_steps(train_with, plain):
    run_dir = train_with("train.max_steps=null", "train.max_tokens=385")  # 128 a step
    assert [r["loss"] for r in runs.records(run_dir)] == [r["loss"] for r in runs.records(plain)]


def test_checkpoints_are_made_kept_and_written_as_asked(train_with, plain):
    run_dir = train_with(
        "checkpoint.every_steps=1", "checkpoint.keep_last=2", "checkpoint.dtype=bf16", "checkpoint.max_shard_size=10KB"
    )
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["checkpoints.json", "latest", "step-00000003", "step-00000004"]
    latest = run_dir / "checkpoints/latest"
    files = sorted(latest.glob("model-*.safetensors"))
    assert len(files) > 1
    index = json.loads((latest / "model.safetensors.index.json").read_text())
    assert {path.name for path in files} == set(index["weight_map"].values())
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    expected = load_file(plain / "checkpoints/latest/model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].bfloat16()), name
    for path in files:
        tensors = load_file(path).values()
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors) <= 10_000


def test_the_sample_continues_the_prompt_for_so_many_tokens(train_with, capsys):
    run_dir = train_with("evaluate.sample_prompt=abc fed", "evaluate.sample_tokens=7")
    out = capsys.readouterr().out
    assert "--- a sample, from 'abc fed' ---\nabc fed" in out
    checkpoint = run_dir / "checkpoints/latest"
    said = [generate(checkpoint, "abc fed", max_new_tokens=count, seed=5) for count in (6, 7, 8)]
    assert len(set(said)) == 3
    assert f"---\n{said[1]}\n" in out


def test_evaluation_blocks(train_with, plain):
    """More blocks, another loss; validation leaves training as it is."""
    records = runs.records(train_with("evaluate.max_blocks=null", "evaluate.every_steps=2"))
    expected = runs.records(plain)
    assert [r["step"] for r in records if "val_loss" in r] == [2, 4]
    assert records[-1]["val_loss"] != expected[-1]["val_loss"]
    assert [r["loss"] for r in records] == [r["loss"] for r in expected]


def test_a_line_every_so_many_steps_holds_means(train_with, plain):
    records, each = runs.records(train_with("logging.every_steps=3")), runs.records(plain)
    assert [r["step"] for r in records] == [3, 4]
    for key in ("loss", "lm_loss", "aux_loss", "z_loss"):
        assert records[0][key] == pytest.approx(sum(r[key] for r in each[:3]) / 3, rel=1e-6)
        assert records[1][key] == each[3][key]
    counts = torch.tensor([r["moe"]["tokens_per_expert"] for r in each[:3]]).sum(0)
    assert records[0]["moe"]["tokens_per_expert"] == counts.tolist()
    assert records[0]["grad_norm"] == each[2]["grad_norm"]


def test_records_of_a_resumed_run_are_means_over_the_same_steps(make_config, tmp_path):
    changes = {
        **SHORT,
        "checkpoint": {"every_steps": 2},
        "logging": {"every_steps": 3, "console": "off"},
        "train": {"max_steps": 6, "micro_batch_size": 2, "global_batch_size": 4},
    }
    straight, stopped = make_config("straight", **changes), make_config("stopped", **changes)
    assert main(["train", str(straight)]) == 0
    assert main(["train", str(stopped), "train.max_steps=4", "evaluate.max_blocks=1"]) == 0
    assert main(["train", str(stopped)]) == 0
    found, expected = runs.timeless(tmp_path / "stopped"), runs.timeless(tmp_path / "straight")
    assert [r["step"] for r in expected] == [2, 3, 4, 6]
    for record in found[:-1]:  # of the first end, which the straight run does not have
        record.pop("val_loss", None), record.pop("val_bits_per_byte", None)
    assert found == expected


@pytest.mark.parametrize("console", ["plain", "off"])
def test_the_console_says_as_much_as_asked(console, train_with, capsys):
    train_with(f"logging.console={console}")
    out, err = capsys.readouterr()
    assert ("step 1/4" in err) == (console == "plain")
    assert "checkpoint: " in out
    if console == "off":
        assert err == ""


def test_wandb_offline_keeps_one_run_over_resumes_and_asks_for_nothing(train_with, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-settings"))
    options = ["logging.wandb=offline", "logging.wandb_project=some-project"]
    run_dir = train_with(*options)
    identity = (run_dir / "wandb_id").read_text()
    train_with(*options, "train.max_steps=5")
    assert (run_dir / "wandb_id").read_text() == identity
    kept = sorted((run_dir / "wandb").glob(f"offline-run-*-{identity}/*.wandb"))
    assert len(kept) == 2
    content = kept[0].read_bytes()
    for word in (b"some-project", b"train/lm_loss", b"eval/loss", b"moe/load_cv/layer_1", b"moe/dead_experts"):
        assert word in content, word


def test_off_leaves_nothing_of_wandb(plain):
    assert not list(plain.glob("wandb*"))


def test_deepspeed_on_one_rank_equals_the_plain_process(make_config, tmp_path, plain):
    """In a process of its own: DeepSpeed leaves its mark on the one that it is used in."""
    done = runs.finish(runs.single(make_config(**SHORT), "parallel.engine=deepspeed"))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    for ours, theirs in zip(runs.records(tmp_path / "run"), runs.records(plain), strict=True):
        for key in {"loss", "aux_loss", "grad_norm", "val_loss"} & set(theirs):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key


@pytest.mark.parametrize(("clip", "bound"), [(0.5, 0.5), (1e3, None), (0.0, None)])
def test_the_clip_bound_holds_for_the_global_norm(clip, bound):
    """Under SGD the update is the rate times the clipped gradient; the norm that is told is the unclipped one."""
    cfg = config(4, 1, 1, optim={"grad_clip": clip, "weight_decay": 0.0, "lr": 0.25})
    one, two = train_steps(cfg, 1), train_steps(cfg, 2)
    changes = [two["weights"][name][1].double() - before.double() for name, (_, before) in one["weights"].items()]
    squares = sum(change.square().sum() for change in changes)
    norm = two["norms"][1]
    assert norm > 0.6
    assert math.sqrt(squares) / 0.25 == pytest.approx(bound or norm, rel=1e-4)


@pytest.mark.parametrize(("device", "gpu", "cpu"), [("cpu", True, True), ("auto", True, False), ("auto", False, True)])
def test_the_device_is_a_gpu_where_there_is_one_unless_told_otherwise(device, gpu, cpu, monkeypatch):
    asked = []

    class Accelerator(SimpleNamespace):
        def __init__(self, cpu, mixed_precision):
            asked.append(cpu)
            super().__init__(num_processes=1, device=torch.device("cpu"), process_index=0)

    from moe_llm.distributed.runtime import start

    monkeypatch.setattr("accelerate.Accelerator", Accelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    start(config(1, 1, 1, train={"device": device}))
    assert asked == [cpu]

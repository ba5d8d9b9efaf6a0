"""The watch over the routers: what it measures against transformers, in every layout, and what each action does."""

import shutil
from pathlib import Path

import pytest
import torch
from support import runs
from support.ci import dear
from support.ranks import fresh_accelerate
from support.training import difference

from moe_llm.cli import main
from moe_llm.config import load_config
from moe_llm.finetune.diff import diff
from moe_llm.finetune.init_from import complete

STEPS = 3


@pytest.fixture(scope="module")
def base(corpus, cache, tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    raw = runs.sections(corpus, cache, root / "run", train={"max_steps": 2}, logging={"console": "off"})
    assert main(["train", str(runs.write_yaml(root / "base.yaml", raw))]) == 0
    return root / "run/checkpoints/latest"


@pytest.fixture
def tuned(base, make_config):
    """Path of a configuration of fine-tuning with a guard."""

    def make(name="run", action="log", **changes):
        guard = {"action": action, "blocks": 3, **changes.pop("guard", {})}
        finetune = {"router_guard": guard, **changes.pop("finetune", {})}
        given = {
            "model": {"init_from": str(base), "router_aux_loss_coef": 0.0},
            "finetune": finetune,
            "data": {"isolate_documents": False},
            "optim": {"lr": 0.03, "schedule": "constant"},
            "train": {"max_steps": STEPS, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32"},
            "evaluate": {"every_steps": 1, "max_blocks": 2},
            "checkpoint": {"every_steps": None},
        }
        for section, values in changes.items():
            given[section] = {**given.get(section, {}), **values}
        path = make_config(name, **given)
        raw = runs.yaml.safe_load(path.read_text())
        raw["model"] = given["model"]  # the shape comes from the checkpoint
        return runs.write_yaml(path, raw)

    return make


def drifts(run_dir: Path) -> list[dict]:
    return [r["router_drift"] for r in runs.records(run_dir) if "router_drift" in r]


def reference_drift(base: Path, tuned: Path, config: Path) -> dict:
    """As transformers' model routes, one block at a time, without this package's model."""
    from transformers import AutoModelForCausalLM

    from moe_llm.data.blocks import ValidationBlocks
    from moe_llm.data.loader import load_data
    from moe_llm.data.tokenizer import load_tokenizer

    loaded = load_config(config, [], complete)
    held_out = load_data(loaded, load_tokenizer(tuned)).validation
    batch = ValidationBlocks(held_out.sources, 3).batches(micro_batch_size=3)[0]
    probabilities = []
    for directory in (base, tuned):
        model, seen = AutoModelForCausalLM.from_pretrained(directory).float().eval(), []
        inputs, weights = [], [layer.mlp.gate.weight for layer in model.model.layers]
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda m, args, out, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            for ids in batch.input_ids_BS:
                inputs.clear()
                model(ids[None])
                seen.append([torch.softmax(x.reshape(len(ids), -1) @ w.T, -1) for x, w in zip(inputs, weights)])
        probabilities.append(torch.stack([torch.stack(block) for block in seen]))  # blocks, layers, tokens, experts
    found = {"kl": [], "agreement": []}
    for layer in range(probabilities[0].shape[1]):
        before, after = (p[:, layer][batch.attention_mask_BS] for p in probabilities)
        found["kl"].append(torch.nn.functional.kl_div(after.log(), before, reduction="batchmean").item())
        same = [len(set(a.topk(2).indices.tolist()) & set(b.topk(2).indices.tolist())) for a, b in zip(before, after)]
        found["agreement"].append(sum(same) / len(same) / 2)
    return found


def test_the_drift_is_what_transformers_models_say(base, tuned, tmp_path, capsys):
    config = tuned()
    assert main(["train", str(config)]) == 0
    assert "router kl " in capsys.readouterr().err
    found, expected = drifts(tmp_path / "run"), reference_drift(base, tmp_path / "run/checkpoints/latest", config)
    assert len(found) == STEPS
    assert found[-1]["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    assert found[-1]["agreement"] == pytest.approx(expected["agreement"])
    assert min(found[-1]["kl"]) > 1e-3
    assert max(found[-1]["agreement"]) < 1


def test_logging_changes_nothing_and_resumes(tuned, tmp_path, base):
    """Also where the file of the base's routers is lost, and where it is of another probe."""
    assert main(["train", str(tuned("straight"))]) == 0
    assert main(["train", str(tuned("off", action="off"))]) == 0
    for record, plain in zip(runs.timeless(tmp_path / "straight"), runs.timeless(tmp_path / "off"), strict=True):
        assert "router_drift" in record
        assert {k: v for k, v in record.items() if k != "router_drift"} == plain
    for name, spoil in (("kept", None), ("lost", Path.unlink), ("other", _other_probe)):
        config = tuned(name)
        assert main(["train", str(config), "train.max_steps=2"]) == 0
        if spoil is not None:
            spoil(tmp_path / name / "router_base.safetensors")
        assert main(["train", str(config)]) == 0
        assert runs.timeless(tmp_path / name) == runs.timeless(tmp_path / "straight")
        same = diff(tmp_path / name / "checkpoints/latest", tmp_path / "straight/checkpoints/latest")
        assert all(row["same_bytes"] == row["matrices"] for row in same)


def _other_probe(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(file), file, {"probe": "another"})


def test_regularising_draws_the_routers_back(tuned, tmp_path):
    changes = {"optim": {"lr": 0.01, "schedule": "constant"}, "train": {"max_steps": 8}}
    assert main(["train", str(tuned("free", **changes))]) == 0
    assert main(["train", str(tuned("held", "regularise", guard={"coefficient": 10.0}, **changes))]) == 0
    free, held = drifts(tmp_path / "free"), drifts(tmp_path / "held")
    # where nothing has moved, the divergence is at its least and has no gradient
    assert held[0]["kl"] == pytest.approx(free[0]["kl"], rel=0.03)
    assert max(held[-1]["kl"]) < 0.25 * max(free[-1]["kl"])


def test_frozen_routers_stay(tuned, base, tmp_path, capsys):
    assert main(["train", str(tuned(action="freeze"))]) == 0
    assert "all else stays as it is" in capsys.readouterr().err
    rows = {row["part"]: row for row in diff(base, tmp_path / "run/checkpoints/latest")}
    assert rows["router"]["same_bytes"] == rows["router"]["matrices"]
    assert rows["experts"]["same_bytes"] == rows["attention"]["same_bytes"] == 0
    assert max(drifts(tmp_path / "run")[-1]["kl"]) > 0  # what they are given has moved
    assert main(["train", str(tuned("none", "freeze", finetune={"trainable": "router"}))]) == 2
    assert "leaves nothing to train" in capsys.readouterr().err


def test_past_the_threshold_a_run_is_saved_and_stops_and_stays_stopped(tuned, tmp_path, capsys):
    assert main(["train", str(tuned("free"))]) == 0
    past = [max(drift["kl"]) for drift in drifts(tmp_path / "free")]
    assert past[0] < past[1]
    config = tuned("stop", "stop", guard={"max_kl": (past[0] + past[1]) / 2})
    capsys.readouterr()
    for end in (": the weights of step 2 are saved\n", ": nothing is changed\n"):
        assert main(["train", str(config)]) == 1
        err = capsys.readouterr().err
        assert "finetune.router_guard.max_kl" in err
        assert err.endswith(end)
        assert sorted(p.name for p in (tmp_path / "stop/checkpoints").iterdir()) == [
            "checkpoints.json",
            "latest",
            "step-00000002",
        ]
    assert main(["train", str(config), "finetune.router_guard.max_kl=100"]) == 0
    assert runs.timeless(tmp_path / "stop") == runs.timeless(tmp_path / "free")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["model.init_from=null", "model.vocab_size=320", "model.hidden_size=16", "model.num_attention_heads=2"],
            "has no base",
        ),
        (
            ["finetune.router_guard.action=stop", "finetune.router_guard.max_kl=1", "evaluate.every_steps=null"],
            "no evaluations",
        ),
        (["finetune.router_guard.action=stop"], "max_kl"),
        (["finetune.router_guard.coefficient=1"], "applies to action regularise"),
    ],
)
def test_a_guard_that_could_do_nothing_is_refused(tuned, tmp_path, capsys, words, sentence):
    assert main(["train", str(tuned()), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def guarded(config) -> dict:
    """Train in this rank's process; drifts, and weights as `train_steps` gives them."""
    from moe_llm.data.loader import load_data
    from moe_llm.data.tokenizer import load_tokenizer
    from moe_llm.distributed.runtime import start
    from moe_llm.train.build import build_trained
    from moe_llm.train.callbacks import Callback
    from moe_llm.train.callbacks.router_guard import RouterGuardCallback
    from moe_llm.train.trainer import Trainer

    fresh_accelerate()
    runtime = start(config)
    tokenizer = load_tokenizer(config.model.init_from)
    place = {"rank": runtime.rank, "world_size": runtime.world_size}
    data = load_data(config, tokenizer, **place, show_progress=False)
    engine, position = build_trained(config, runtime, None)
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    records: list[dict] = []

    class Records(Callback):
        def on_record(self, run, record):
            records.append(record)

    callbacks = {"guard": RouterGuardCallback(), "records": Records()}
    Trainer(config, runtime, engine, data, tokenizer, position, callbacks=callbacks).fit()
    weights = {
        entry.name: (entry.first_expert, engine.read(entry.name, "weight").clone()) for entry in engine.entries()
    }
    drift, norms = ([record[key] for record in records] for key in ("router_drift", "grad_norm"))
    return {"weights": weights, "drift": drift, "norms": norms}


@pytest.mark.parametrize(("stage", "blocks"), dear([(1, 3), (2, 1), (3, 3)], (2, 1)))
def test_expert_parallel_ranks_equal_one_process(two_ranks, tuned, tmp_path, stage, blocks):
    """Also where one rank has no block of the probe."""
    guard = {"coefficient": 30.0, "blocks": blocks}
    optim = {"name": "sgd", "lr": 0.3}
    config = tuned(action="regularise", guard=guard, optim=optim, train={"activation_checkpointing": stage == 3})
    alone = guarded(load_config(config, [], complete))
    layout = [
        "train.micro_batch_size=1",
        "parallel.expert_parallel_size=2",
        f"parallel.zero_stage={stage}",
        f"run.dir={tmp_path / 'ranks'}",
    ]
    found = two_ranks.run(guarded, load_config(config, layout, complete))
    for per_rank in found:
        assert per_rank["drift"] == found[0]["drift"]
        assert per_rank["norms"] == pytest.approx(alone["norms"], rel=1e-3)
        for ours, theirs in zip(per_rank["drift"], alone["drift"], strict=True):
            assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-3)
            assert ours["agreement"] == pytest.approx(theirs["agreement"], abs=0.02)
    worst, where = difference(found, alone, "weights")
    assert worst < 1e-4, where
    shutil.rmtree(tmp_path / "ranks")

"""`checkpoint.ema`: the average that a run keeps, saves, measures and goes on with."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from support import runs

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.cli import main
from moe_llm.config import load_config
from moe_llm.data.loader import load_data
from moe_llm.data.packing import model_inputs
from moe_llm.data.tokenizer import load_tokenizer

DECAY = 0.8
EACH = {"every_steps": 1, "ema": {"decay": DECAY, "start_step": 1, "every_steps": 2}}
EVALUATED = {"every_steps": 2, "max_blocks": 4, "ema": True}


@pytest.fixture(scope="module")
def averaged_run(corpus, cache, tmp_path_factory):
    """Saved after each of 6 steps; the average takes in those of 3 and 5."""
    root = tmp_path_factory.mktemp("averaged")
    raw = runs.sections(corpus, cache, root / "run", checkpoint=EACH, evaluate=EVALUATED)
    assert main(["train", str(runs.write_yaml(root / "run.yaml", raw))]) == 0
    return root / "run"


def step(run_dir, number, *parts):
    return run_dir.joinpath("checkpoints", f"step-{number:08d}", *parts)


def test_it_is_what_a_hand_computes_from_each_steps_weights(averaged_run):
    assert [number for number in range(1, 7) if step(averaged_run, number, "ema").exists()] == [3, 4, 5, 6]
    at = {number: load_file(step(averaged_run, number, "model.safetensors")) for number in (3, 5)}
    for number in (3, 4, 5, 6):
        found = load_file(step(averaged_run, number, "ema/model.safetensors"))
        assert found.keys() == at[3].keys()
        for name, tensor in found.items():
            expected = at[3][name] if number < 5 else (at[5][name] + DECAY * at[3][name]) / (1 + DECAY)
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(at[3][name], at[5][name]) for name in at[3])


def test_it_changes_nothing_of_the_run(averaged_run, finished_run):
    plain, averaged = runs.timeless(finished_run), runs.timeless(averaged_run)
    assert [r["step"] for r in averaged if "ema_val_loss" in r] == [4, 6]  # at 2 there is none
    assert plain == [{k: v for k, v in r.items() if not k.startswith("ema_")} for r in averaged]
    for name in ("model.safetensors", "trainer/optimizer.safetensors"):
        assert step(finished_run, 6, name).read_bytes() == step(averaged_run, 6, name).read_bytes(), name


def test_its_loss_is_that_of_the_directory_that_is_saved(averaged_run):
    config = load_config(averaged_run / "config.yaml", [])
    for directory, key in ((step(averaged_run, 6, "ema"), "ema_val_loss"), (step(averaged_run, 6), "val_loss")):
        held_out = load_data(config, load_tokenizer(directory), show_progress=False).validation
        model = MoEForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            total = sum(model(**model_inputs(batch)).loss_sum.item() for batch in held_out.batches(micro_batch_size=2))
        recorded = runs.records(averaged_run)[-1]
        assert recorded[key] == pytest.approx(total / held_out.num_targets, rel=1e-6)
        assert recorded[key.replace("loss", "bits_per_byte")] == pytest.approx(held_out.bits_per_byte(recorded[key]))
    assert recorded["ema_val_loss"] != recorded["val_loss"]


@pytest.mark.parametrize("changes", [
    {"train": {"precision": "bf16"}, "checkpoint": {"dtype": "bf16", "async": True}},
    {"finetune": {"trainable": ["*.experts.*", "lm_head.*"], "experts": [1]}},
], ids=["bf16", "some experts"])  # fmt: skip
def test_a_resumed_run_keeps_the_same_average(make_config, finished_run, tmp_path, changes):
    ema = {"every_steps": 2, "ema": {"decay": DECAY}, **changes.get("checkpoint", {})}
    changes = {**changes, "checkpoint": ema, "evaluate": EVALUATED, "optim": {"lr": 3e-3, "schedule": "constant"}}
    origin = shutil.copytree(finished_run / "checkpoints/step-00000006", tmp_path / "origin")
    if "finetune" in changes:
        changes["model"] = {"init_from": str(origin)}
    straight, stopped = make_config("straight", **changes), make_config("stopped", **changes)
    assert main(["train", str(straight)]) == 0
    assert main(["train", str(stopped), "train.max_steps=2"]) == 0
    assert main(["train", str(stopped)]) == 0
    found, expected = runs.timeless(tmp_path / "stopped"), runs.timeless(tmp_path / "straight")
    assert [r for r in found if r["step"] > 2] != []
    if "finetune" in changes:
        average, base = (
            load_file(file)
            for file in (next(step(tmp_path / "stopped", 6, "ema").glob("model-00001*")), origin / "model.safetensors")
        )
        assert all("experts.1." in name or "lm_head" in name for name in average)
        assert not any(torch.equal(tensor, base[name]) for name, tensor in average.items())
    assert found[2:] == expected[2:]
    for file in sorted(step(tmp_path / "straight", 6, "ema").iterdir()):
        assert file.read_bytes() == step(tmp_path / "stopped", 6, "ema", file.name).read_bytes(), file.name


def test_a_run_that_had_none_begins_one_and_says_so(held, capsys):
    config = str(held.parent / "held.yaml")
    assert main(["train", config, "train.max_steps=8", "checkpoint.ema.decay=0.5"]) == 0
    assert "the checkpoint of step 6 holds no average: a new one begins" in capsys.readouterr().err
    assert step(held, 8, "ema").is_dir()
    assert main(["train", config, "train.max_steps=9"]) == 0
    assert not step(held, 9, "ema").exists()


@pytest.mark.parametrize(("overrides", "words"), [
    (["checkpoint.ema.start_step=3"], "checkpoint.ema.start_step=3 applies to nothing without decay"),
    (["checkpoint.ema.every_steps=2"], "checkpoint.ema.every_steps=2 applies to nothing without decay"),
    (["checkpoint.ema.decay=1"], "checkpoint.ema.decay"),
    (["evaluate.ema=true"], "evaluate.ema=true has no average to measure: set checkpoint.ema.decay"),
    (["checkpoint.ema.decay=0.9", "checkpoint.ema.start_step=5", "checkpoint.ema.every_steps=2"],
     "checkpoint.ema.start_step=5 with every_steps=2"),
])  # fmt: skip
def test_what_makes_no_average_is_refused(make_config, tmp_path, capsys, overrides, words):
    assert main(["train", str(make_config()), *overrides]) == 2
    error = capsys.readouterr().err
    assert words.lower() in error.lower()
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_factors_of_a_product_have_no_average(make_config, finished_run, tmp_path, capsys):
    origin = f"model.init_from={finished_run / 'checkpoints/step-00000006'}"
    assert main(["train", str(make_config()), origin, "checkpoint.ema.decay=0.9", "finetune.lora.rank=2"]) == 2
    assert "checkpoint.ema.decay=0.9 averages weights, and with finetune.lora.rank=2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""Runs that learn from teachers: the loss is what transformers' models give, and each key acts."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from support import runs
from support.distillation import learn

from moe_llm.cli import main
from moe_llm.config import load_config
from moe_llm.distill.teachers import documents


def of(*paths: Path, **settings) -> dict:
    return {"teachers": [{"path": str(path)} for path in paths], **settings}


def log_probabilities(directory: Path, batch) -> torch.Tensor:
    """Of transformers' model for the labelled positions, one document at a time."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(directory).float().eval(), []
    with torch.no_grad():
        for document in documents(batch):
            logits = model(batch.input_ids_BS[document][None]).logits[0, :, : runs.MODEL["vocab_size"]]
            found.append(logits.log_softmax(-1)[batch.labels_BS[document] != -100])
    return torch.cat(found)


def expected_losses(config: Path, student: Path, teachers: dict[Path, float], temperature: float):
    """(cross-entropy, temperature^2 * KL(teachers, student)) of the first step's batch, means over its labels."""
    from moe_llm.data.loader import load_data
    from moe_llm.data.tokenizer import load_tokenizer

    loaded = load_config(config)
    batch = load_data(loaded, load_tokenizer(student), show_progress=False).train.rows(0, 4)
    p = sum(share * log_probabilities(path, batch).exp() for path, share in teachers.items())
    log_p = (p.log() / temperature).log_softmax(-1)
    log_q = log_probabilities(student, batch)
    hard = -log_q.gather(1, batch.labels_BS[batch.labels_BS != -100][:, None]).mean()
    log_q = (log_q / temperature).log_softmax(-1)
    return hard.item(), temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean().item()


@pytest.mark.parametrize("isolated", [True, False])
def test_the_losses_are_those_of_transformers_models(isolated, trained, tmp_path, mixtures, dense):
    """A mixture and a dense model together, which have three quarters and a quarter of the say."""
    first, second = mixtures
    distill = of(second, dense, temperature=2.0, alpha=0.25)
    distill["teachers"][0]["weight"], distill["teachers"][1]["weight"] = 1.5, 0.5
    model = {**runs.MODEL, "init_from": str(first), "router_aux_loss_coef": 0.1}
    record = trained(
        "run",
        distill,
        model=model,
        tokenizer={"path": str(first)},
        data={"isolate_documents": isolated},
        train={"max_steps": 1},
    )[0]
    hard, soft = expected_losses(tmp_path / "run.yaml", first, {second: 0.75, dense: 0.25}, 2.0)
    assert record["lm_loss"] == pytest.approx(hard, rel=1e-5)
    assert record["distill_loss"] == pytest.approx(soft, rel=1e-4)
    assert soft > 0.1
    total = 0.75 * hard + 0.25 * soft + 0.1 * record["aux_loss"] + 0.001 * record["z_loss"]
    assert record["loss"] == pytest.approx(total, rel=1e-5)


def test_the_student_comes_nearer_and_is_evaluated_on_the_text_alone(trained, mixtures, tmp_path):
    records = trained("run", of(*mixtures, alpha=1.0), "optim.lr=0.02", train={"max_steps": 16})
    soft = [r["distill_loss"] for r in records]
    assert soft[-1] < 0.5 * soft[0]
    from moe_llm.checkpoint.pretrained import MoEForCausalLM
    from moe_llm.data.loader import load_data
    from moe_llm.data.packing import model_inputs
    from moe_llm.data.tokenizer import load_tokenizer

    latest = tmp_path / "run/checkpoints/latest"
    data = load_data(load_config(tmp_path / "run.yaml"), load_tokenizer(latest), show_progress=False)
    batch = data.validation.batches(micro_batch_size=4)[0]
    with torch.no_grad():
        output = MoEForCausalLM.from_pretrained(latest)(**model_inputs(batch))
    assert records[-1]["val_loss"] == pytest.approx((output.loss_sum / output.num_targets).item(), rel=1e-5)
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(latest, output_loading_info=True)
    assert not any(info.values())


def test_every_key_acts_and_the_device_does_not(student, mixtures, dense):
    config = student("run", of(*mixtures))

    def last(*words: str) -> dict[str, float]:
        return learn(load_config(config, [*words, "train.max_steps=2"]))["losses"][-1]

    plain, none = last(), last("distill={}", f"tokenizer.path={mixtures[0]}")
    changed = [
        "distill.divergence=reverse_kl",
        "distill.divergence=jensen_shannon",
        "distill.temperature=3",
        "distill.alpha=0.9",
        "distill.cache_top_k=5",
        "distill.teachers.0.weight=4",
        "distill.teachers.1.dtype=bf16",
        f"distill.teachers.1.path={dense}",
    ]
    seen = {word: last(word) for word in changed} | {"plain": plain}
    assert len({losses["distill"] for losses in seen.values()}) == len(seen)
    # one update by a teacher in bf16 may leave the last digits of the next loss as they were
    learned = [losses["lm"] for word, losses in seen.items() if "dtype" not in word]
    assert len({*learned, none["lm"]}) == len(seen)
    assert seen["distill.divergence=jensen_shannon"]["distill"] < math.log(2)
    assert last("distill.teachers.0.device=cpu") == plain
    assert none["distill"] is None


@pytest.mark.parametrize("top_k", [None, 7])
def test_a_stopped_run_goes_on_to_the_same_weights(top_k, trained, student, tmp_path, mixtures):
    from moe_llm.finetune.diff import diff

    distill = of(*mixtures, cache_top_k=top_k)
    straight = trained("straight", distill, train={"max_steps": 4}, checkpoint={"every_steps": 2})
    config = student("stopped", distill, train={"max_steps": 4}, checkpoint={"every_steps": 2})
    assert main(["train", str(config), "train.max_steps=2"]) == 0
    assert main(["train", str(config)]) == 0
    stopped = runs.timeless(tmp_path / "stopped")
    for record in stopped[1:2]:  # of the first end, which the straight run does not have
        record.pop("val_loss"), record.pop("val_bits_per_byte")
    assert stopped == straight
    same = diff(tmp_path / "straight/checkpoints/latest", tmp_path / "stopped/checkpoints/latest")
    assert all(row["same_bytes"] == row["matrices"] for row in same)


def test_a_dense_student_and_recomputation_in_bf16(trained, mixtures):
    dense = {**runs.MODEL, "num_local_experts": 1, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.0}
    records = trained(
        "run", of(*mixtures), model=dense, train={"max_steps": 2, "precision": "bf16", "activation_checkpointing": True}
    )
    assert all(math.isfinite(r["distill_loss"]) for r in records)


def test_the_tokenizer_is_the_teachers_unless_another_is_named(student, mixtures, dense):
    path = student("run", of(dense))
    assert load_config(path).tokenizer.path == str(dense)
    assert load_config(path, [f"tokenizer.path={mixtures[0]}"]).tokenizer.path == str(mixtures[0])


@pytest.fixture
def broken(tmp_path, mixtures, dense) -> dict[str, Path]:
    """Directories that are no teachers, each for a reason of its own."""
    import json

    found = {name: Path(shutil.copytree(dense, tmp_path / name)) for name in ("short", "words", "strange", "partial")}
    for name, changes in (("short", {"max_position_embeddings": 8}), ("strange", {"model_type": "vit"})):
        file = found[name] / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    tokenizer = found["words"] / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    word = next(w for w, i in content["model"]["vocab"].items() if i == 300)
    content["model"]["vocab"][f"{word}x"] = content["model"]["vocab"].pop(word)
    content["model"]["merges"] = [m for m in content["model"]["merges"] if word not in ("".join(m), *m)]
    tokenizer.write_text(json.dumps(content))
    from safetensors.torch import load_file, save_file

    tensors = load_file(found["partial"] / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, found["partial"] / "model.safetensors", {"format": "pt"})
    return found | {"missing": tmp_path / "missing"}


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("missing", [], "does not exist: name a checkpoint directory"),
        ("missing", ["distill.cache_top_k=4"], "no cache of what it said"),
        ("short", [], "reads 8 positions, fewer than data.sequence_length=32"),
        ("words", [], "has another vocabulary"),
        ("strange", [], "'vit', for which transformers has no causal language model"),
        ("partial", [], "lacks model.layers.1.mlp.up_proj.weight"),
        (None, ["distill.teachers.0.device=cuda:63"], "is not there"),
        (None, ["distill.teachers.0.device=gpu"], "distill.teachers.0.device=gpu is no device"),
        (None, ["distill.teachers.0.wieght=2"], "did you mean distill.teachers.0.weight?"),
        (None, ["distill.teachers.0.weight=0"], "distill.teachers.0.weight=0"),
        (None, ["distill.alpha=0"], "distill.alpha=0"),
        (None, ["distill.temperature=0"], "distill.temperature=0"),
        (None, ["distill.teachers=[]", "distill.alpha=0.9"], "applies to no teacher"),
        (None, ["model.vocab_size=512"], "has 328 logits, fewer than model.vocab_size=512: set model.vocab_size=328"),
    ],
)
def test_what_cannot_teach_is_refused_in_a_sentence(
    name, words, sentence, student, broken, mixtures, dense, tmp_path, capsys
):
    path = student("run", of(broken.get(name, dense)), tokenizer={"path": str(mixtures[0])})
    capsys.readouterr()
    assert main(["train", str(path), *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1, err
    assert not (tmp_path / "run/config.yaml").exists()


def test_what_does_not_distil_says_so(student, mixtures, capsys):
    path = str(student("run", of(*mixtures)))
    plan = ["plan", path, "--gpus", "1", "--gpu-memory", "80GiB"]
    for command in (plan, ["bench", path]):
        assert main(command) == 2
        assert capsys.readouterr().err.endswith("add distill={}\n")
    assert main([*plan, "distill={}"]) == 0


def test_the_doctor_leaves_the_teachers_out(student, mixtures):
    from moe_llm.doctor.shrink import shrink

    small = shrink(load_config(student("run", of(*mixtures, alpha=0.9))), 2, 2)
    assert not small.config.distill.teachers
    assert any(note.startswith("distill is left out") for note in small.notes)

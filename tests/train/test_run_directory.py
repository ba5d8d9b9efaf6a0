"""What a run leaves behind: every file as documented, usable by transformers, and enough to make the run again."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from support import runs

from moe_llm.cli import main
from moe_llm.config import load_config
from moe_llm.data.loader import load_data
from moe_llm.data.sources import named_sources, read_documents
from moe_llm.data.split import find_holdout, training_texts
from moe_llm.data.tokenizer import load_tokenizer

KEYS = {
    "step",
    "tokens",
    "loss",
    "lm_loss",
    "aux_loss",
    "z_loss",
    "grad_norm",
    "lr",
    "tokens_per_second",
    "fill",
    "moe",
    "sources",
}
MEASURED = {"val_loss", "val_bits_per_byte"}


@pytest.fixture(scope="module")
def checkpoint(finished_run):
    return finished_run / "checkpoints/step-00000006"


def test_every_documented_file_and_no_other(finished_run):
    top = {path.name for path in finished_run.iterdir()}
    assert top == {"config.yaml", "metrics.jsonl", "facts.json", "plots", "tokenizer", "checkpoints"}
    steps = {path.name for path in (finished_run / "checkpoints").iterdir()}
    assert steps == {"step-00000003", "step-00000006", "latest", "checkpoints.json"}
    assert (finished_run / "checkpoints/latest").resolve().name == "step-00000006"
    names = {path.name for path in (finished_run / "checkpoints/latest").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "trainer",
    }


def test_plots_are_pictures(finished_run):
    from matplotlib.image import imread

    for name in ("loss", "expert_load"):
        pixels = imread(finished_run / f"plots/{name}.png")
        assert min(pixels.shape[:2]) > 100
        assert pixels[..., :3].std() > 0.01, "blank"


def test_a_run_without_pictures_has_no_directory_for_them(train, capsys):
    assert not (train("plain", train={"max_steps": 1}) / "plots").exists(), "logging.plots=false"
    assert "plots:" not in capsys.readouterr().out


def test_records_have_the_documented_keys(finished_run):
    records = runs.records(finished_run)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["tokens"] for r in records] == [128 * step for step in range(1, 7)]
    for record in records:
        due = MEASURED if record["step"] % 2 == 0 else set()
        assert set(record) == KEYS | due
        assert all(math.isfinite(value) for key, value in record.items() if key not in ("moe", "sources"))
        (source,) = record["sources"].values()
        assert source["tokens"] == pytest.approx(record["tokens"], abs=2)  # a share of all that the source has
        total = record["lm_loss"] + 0.02 * record["aux_loss"] + 0.001 * record["z_loss"]
        assert record["loss"] == pytest.approx(total, rel=1e-12)
        assert record["tokens_per_second"] > 0


def test_routing_records_describe_every_layer(finished_run):
    for record in runs.records(finished_run):
        moe = record["moe"]
        keys = ["tokens_per_expert", "load_cv", "router_entropy", "dead_experts", "dropped_share"]
        assert sorted(moe) == sorted([*keys, "expert_grad_norm", "experts_per_token"])
        assert moe["experts_per_token"] == [2, 2]
        assert {len(values) for values in moe.values()} == {2}
        for counts, cv, entropy, dead, dropped in zip(*(moe[key] for key in keys)):
            assert dropped == 0
            assert len(counts) == 4
            # two experts for each of the step's tokens; the source's last block has padding, which does not count
            assert 2 * (128 - 32) < sum(counts) <= 2 * 128
            deviation = torch.tensor(counts, dtype=torch.float64).std(correction=0).item()
            assert cv == pytest.approx(deviation / (sum(counts) / 4))
            assert 0 < entropy <= math.log(4) + 1e-6
            assert dead == [e for e, count in enumerate(counts) if count == 0]


def test_the_written_configuration_makes_the_same_run_again(finished_run, tmp_path):
    assert main(["train", str(finished_run / "config.yaml"), f"run.dir={tmp_path / 'again'}"]) == 0
    assert runs.timeless(tmp_path / "again") == runs.timeless(finished_run)
    written, again = (load_config(d / "config.yaml") for d in (finished_run, tmp_path / "again"))
    assert written.model_copy(update={"run": again.run}) == again


def test_a_finished_run_is_left_as_it_is(finished_run, tmp_path, capsys):
    copy = runs.copy_run(finished_run, tmp_path / "copy")
    # the tokenizer's directory is part of the run's identity, so the copy brings its own configuration
    config = tmp_path / "copy.yaml"
    config.write_text((copy / "config.yaml").read_text().replace(str(finished_run), str(copy)))
    before = {name: value for name, value in runs.fingerprint(copy).items() if not name.startswith("plots")}
    assert main(["train", str(config)]) == 0
    after = {name: value for name, value in runs.fingerprint(copy).items() if not name.startswith("plots")}
    assert {name for name in after if before.get(name) != after[name]} == {"config.yaml"}  # it names run.dir
    assert "checkpoint: " in capsys.readouterr().out


IN_TRANSFORMERS = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
path, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)
model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids,
                     tokenizer.eos_token_id]])
with torch.no_grad():
    logits = model(ids).logits.float()
nats = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
sample = model.generate(ids[:, :4], max_new_tokens=5, do_sample=False)
print(json.dumps({
    "class": type(model).__name__, "nats": nats, "targets": ids.shape[1] - 1, "new": sample.shape[1] - 4,
    "loading": {key: sorted(map(str, info[key])) for key in info}, "back": tokenizer.decode(ids[0, 1:-1]),
}))
"""
TEXT = "abc fed naïve 漢字 lo mep"


@pytest.fixture(scope="module")
def in_transformers(checkpoint):
    """A fresh process that has never heard of this package loads a checkpoint."""
    environment = {k: v for k, v in runs.environment().items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", IN_TRANSFORMERS, str(checkpoint), TEXT],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return json.loads(done.stdout), done.stderr


def test_transformers_loads_a_checkpoint_without_a_word(in_transformers):
    found, errors = in_transformers
    assert found["class"] == "MixtralForCausalLM"
    assert not any(found["loading"].values()), found["loading"]
    assert found["new"] == 5
    assert found["back"] == TEXT
    for word in ("missing", "unexpected", "newly initialized", "mismatch", "warning"):
        assert word not in errors.lower()


def test_evaluate_is_exact_by_transformers_own_logits(in_transformers, checkpoint, tmp_path, capsys):
    found, _ = in_transformers
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert main(["evaluate", str(checkpoint), "--data", str(tmp_path / "text.txt"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"loss", "perplexity", "bits_per_byte", "tokens"}
    assert result["tokens"] == found["targets"]
    nats, size = found["nats"], len(TEXT.encode("utf-8"))
    assert result["loss"] == pytest.approx(nats / found["targets"], rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / found["targets"]), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_validation_in_training_is_the_loss_of_the_saved_model_on_the_held_out_text(checkpoint, finished_run):
    """By transformers' logits, document by document, which packing must not change."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = load_config(finished_run / "config.yaml", ["evaluate.max_blocks=null"])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    record = runs.records(finished_run)[-1]
    validation = load_data(config, tokenizer, show_progress=False).validation
    some = load_data(load_config(finished_run / "config.yaml"), tokenizer, show_progress=False).validation
    assert 0 < len(some) == 4 < len(validation)
    nats, targets = 0.0, 0
    for batch in some.batches(micro_batch_size=1):
        documents = batch.document_ids_BS[0]
        for document in documents[documents >= 0].unique():
            inside = documents == document
            labels = batch.labels_BS[0, inside]
            with torch.no_grad():
                logits = model(batch.input_ids_BS[:, inside]).logits[0].double()
            nats += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
            targets += int((labels != -100).sum())
    assert record["val_loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert record["val_bits_per_byte"] == pytest.approx(some.bits_per_byte(nats / targets), rel=1e-5)


def test_bits_per_byte_of_all_held_out_text_counts_every_byte(train):
    """Loss times targets is what the text costs; its bytes are those of the documents that do not train."""
    run_dir = train(evaluate={"max_blocks": None}, train={"max_steps": 1})
    config = load_config(run_dir / "config.yaml")
    field, source = named_sources(config)[0]
    training = set(training_texts(field, source, find_holdout(config)))
    held_out = [text for text in read_documents(source, field) if text not in training]
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    targets = sum(len(tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in held_out)
    size = sum(len(text.encode("utf-8")) for text in held_out)
    record = runs.records(run_dir)[-1]
    assert record["val_bits_per_byte"] == pytest.approx(record["val_loss"] * targets / math.log(2) / size, rel=1e-12)


def test_generate_continues_the_prompt(checkpoint, capsys):
    argv = ["generate", str(checkpoint), "--prompt", "abc fed", "--max-new-tokens", "8"]
    outputs = {}
    for extra in (["--temperature", "0"], ["--seed", "1"], ["--seed", "1"], ["--seed", "2"]):
        assert main([*argv, *extra]) == 0
        outputs.setdefault(tuple(extra), []).append(capsys.readouterr().out)
    assert all(text.startswith("abc fed") and len(text) > 8 for texts in outputs.values() for text in texts)
    first, second = outputs["--seed", "1"]
    assert first == second != outputs["--seed", "2"][0]


@pytest.mark.parametrize("command", [["generate", "none", "--prompt", "p"], ["evaluate", "none", "--data", "x"]])
def test_what_is_no_checkpoint_is_one_sentence(command, capsys):
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "moe-llm: error: checkpoint 'none' does not exist: name a checkpoint directory, "
        "such as RUN/checkpoints/step-00000020\n"
    )


def test_a_run_given_for_a_checkpoint_is_told_its_newest(finished_run, capsys):
    assert main(["evaluate", str(finished_run), "--data", "x"]) == 2
    assert f"such as {finished_run}/checkpoints/step-00000006" in capsys.readouterr().err


def test_a_run_at_its_end_says_so(held, capsys):
    assert main(["train", str(held.parent / "held.yaml")]) == 0
    assert "nothing is left to train: the run has 6 of 6 steps" in capsys.readouterr().err


def test_a_rate_that_is_never_reached_is_told(make_config, capsys):
    assert main(["train", str(make_config("warm")), "train.max_steps=2", "optim.warmup_steps=2"]) == 0
    err = capsys.readouterr().err
    assert "the learning rate does not reach optim.lr" in err
    assert "of 2: lower optim.warmup_steps, or raise train.max_steps\n" in err
    assert "heart" not in err
    assert "nothing is held out" not in err
    assert "kernels" not in err


def test_a_source_read_many_times_or_not_held_out_is_told(make_config, corpus, tmp_path, capsys):
    small = tmp_path / "small.txt"
    small.write_text("def f(x):\n    return x + 1\n" * 2)
    sources = [
        {"type": "files", "path": str(corpus), "document": "line", "weight": 0.1},
        {"type": "files", "path": str(small), "weight": 0.9},
    ]
    data = {"sources": sources, "sequence_length": 32, "validation_fraction": 0.1, "num_workers": 1}
    steps = {"max_steps": 2, "micro_batch_size": 32, "global_batch_size": 64, "precision": "fp32", "device": "cpu"}
    assert main(["train", str(make_config("small", data=data | {"cache_dir": str(tmp_path / "c")}, train=steps))]) == 0
    err = capsys.readouterr().err
    assert re.search(
        r"^data\.sources\.1 has \d+ tokens and is read \d\d times in train\.max_steps=2: a model learns such text by "
        r"heart, so lower train\.max_steps, bring more data or give a source less weight$",
        err,
        re.MULTILINE,
    )
    assert err.count("heart") == 1
    assert (
        "of data.sources.1 nothing is held out, so that validation measures the other sources alone: raise "
        "data.validation_fraction (0.1), add text or set data.validation_sources\n"
    ) in err
    assert (
        "the routers' losses depend on train.micro_batch_size: set model.balance_over=step if they should not\n" in err
    )

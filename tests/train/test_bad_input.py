"""Each mistake is one sentence that names field, value and remedy, with exit code 2; nothing is written or changed."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from support import runs

from moe_llm.cli import main
from moe_llm.train import metrics
from moe_llm.train import run as run_module

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def refused(capfd):
    """Run a command that must be refused: returns its sentence, once all else has been checked."""

    def refused(argv: list[str], untouched: Path, allowed: str | None = None) -> str:
        before = runs.fingerprint(untouched)
        capfd.readouterr()
        assert main(argv) == 2
        out, err = capfd.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert "Traceback" not in err
        [sentence] = [line for line in lines if line.startswith("moe-llm: error: ")]
        assert lines[-1] == sentence, "more than one line was said, or something after it"
        after = runs.fingerprint(untouched)
        if allowed is not None:
            after = {name: what for name, what in after.items() if name in before or not name.startswith(allowed)}
        assert after == before, "something was written"
        return sentence.removeprefix("moe-llm: error: ")

    return refused


IN_THE_FILE = {
    "unknown key": (["model.num_expert=4"], "unknown configuration key model.num_expert: did you mean "),
    "unknown section": (["optimizer.lr=1"], "unknown configuration key optimizer: did you mean optim?"),
    "wrong type": (["optim.lr=fast"], "optim.lr=fast is refused: "),
    "heads": (["model.num_attention_heads=3"], "model.hidden_size=16 is not divisible by num_attention_heads=3: "),
    "kv heads": (["model.num_attention_heads=4", "model.num_key_value_heads=3"], "model.num_key_value_heads=3 does "),
    "top-k": (["model.num_experts_per_tok=5"], "model.num_experts_per_tok=5 is above num_local_experts=4: use at "),
    "experts and EP": (
        ["parallel.expert_parallel_size=3"],
        "parallel.expert_parallel_size=3 does not divide model.num_local_experts=4: ",
    ),
    "EP above the world": (
        ["parallel.expert_parallel_size=2"],
        "parallel.expert_parallel_size=2 does not divide the number of launched ranks, 1: ",
    ),
    "micro and global": (["train.global_batch_size=3"], "train.global_batch_size=3 is not a multiple of "),
    "two lengths": (["train.max_tokens=9"], "train.max_steps=6 stands beside train.max_tokens=9: "),
    "missing data": (["data.sources.0.path=none.txt"], "data.sources.0.path=none.txt does not exist: "),
    "nothing matches": (["data.sources.0.path=none/*.txt"], "data.sources.0.path=none/*.txt matches no file: "),
    "a file as run.dir": (["run.dir={corpus}"], "run.dir='{corpus}' is a file: name a directory"),
    "run.dir of something else": (["run.dir={folder}"], "run.dir='{folder}' holds 'thesis.tex' and is no run's "),
    "run.dir that cannot be": (["run.dir=/proc/none"], "run.dir='/proc/none' cannot be "),
    "no unit": (["checkpoint.max_shard_size=5"], "checkpoint.max_shard_size=5 is not a size: write it like 5GB"),
    "one beta": (["optim.betas=0.9"], "optim.betas=0.9 is refused: it must be a list, such as [0.9, 0.95]"),
    "no such checkpoint": (
        ["checkpoint.resume=none"],
        "checkpoint.resume='none' does not exist: name a checkpoint directory",
    ),
    "no such tokenizer": (
        ["tokenizer.path=./none.model", "model.vocab_size=null"],
        "tokenizer.path=./none.model does not exist: ",
    ),
    "vocabulary too large": (["model.vocab_size=100000"], "model.vocab_size=100000 is more than the text for the "),
}


@pytest.mark.parametrize("name", IN_THE_FILE)
def test_a_mistake_in_a_new_run(name, refused, make_config, tmp_path, corpus):
    overrides, start = IN_THE_FILE[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.tex").write_text("All of it.")
    overrides = [text.format(corpus=corpus, folder=folder) for text in overrides]
    sentence = refused(["train", str(make_config()), *overrides], tmp_path)
    assert sentence.startswith(start.format(corpus=corpus, folder=folder))
    assert ". " not in sentence


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (
            ["parallel.expert_parallel_size=2"],
            "parallel.expert_parallel_size=2 does not divide the number of launched ranks, 3: launch a multiple of it "
            "(accelerate launch --num_processes), or lower it",
        ),
        ([], "train.global_batch_size=4 is not a multiple of train.micro_batch_size=2 x 3 ranks = 6: change one"),
    ],
)
def test_what_does_not_fit_the_launched_ranks(overrides, start, refused, make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert refused(["train", str(make_config()), *overrides], tmp_path).startswith(start)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty, name files that hold text"), (b"\n\n", "holds no text"), (b"abc \xff\xfe", "is not UTF-8 at ")],
)
def test_unusable_text(content, words, refused, make_config, tmp_path):
    (tmp_path / "bad.txt").write_bytes(content)
    sentence = refused(["train", str(make_config()), f"data.sources.0.path={tmp_path / 'bad.txt'}"], tmp_path)
    assert sentence.startswith("data.sources.0")
    assert words in sentence


def test_a_tokenizer_of_another_size(refused, make_config, finished_run, tmp_path):
    tokenizer = f"tokenizer.path={finished_run / 'tokenizer'}"
    sentence = refused(["train", str(make_config()), tokenizer, "model.vocab_size=300"], tmp_path)
    assert sentence.startswith("model.vocab_size=300 does not match the tokenizer of 320 tokens: use 320")
    sentence = refused(["tokenizer", str(make_config()), tokenizer, "model.vocab_size=300"], tmp_path)
    assert sentence.startswith("model.vocab_size=300 does not match the tokenizer of 320 tokens: use 320")


@pytest.mark.parametrize(
    ("override", "key"),
    [("optim.lr=1e-4", "optim.lr"), ("run.seed=6", "run.seed"), ("model.hidden_size=32", "model.hidden_size"),
     ("train.global_batch_size=8", "train.global_batch_size"), ("data.sequence_length=16", "data.sequence_length")],
)  # fmt: skip
def test_a_run_directory_that_holds_another_configuration(override, key, refused, held):
    sentence = refused(["train", str(held.parent / "held.yaml"), override], held)
    assert sentence.startswith(f"{key}=")
    assert "with which the run in" in sentence
    assert sentence.endswith(", or set another run.dir")


def test_resume_never_on_a_run_that_is_there(refused, held):
    sentence = refused(["train", str(held.parent / "held.yaml"), "checkpoint.resume=never"], held)
    assert sentence.startswith("checkpoint.resume=never, but run.dir=")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


SPOILED = [
    ("model.safetensors", truncate, "is truncated"),
    ("model.safetensors", flip, "is damaged"),
    ("trainer/optimizer.safetensors", flip, "is damaged"),
    ("config.json", Path.unlink, "is missing"),
    ("trainer/state.json", truncate, "is truncated"),
    ("trainer/manifest.json", Path.unlink, "has no trainer/manifest.json"),
]


@pytest.mark.parametrize(("file", "spoil", "words"), SPOILED)
def test_resuming_from_a_spoiled_checkpoint(file, spoil, words, refused, held, make_config, tmp_path):
    spoil(held / "checkpoints/step-00000006" / file)
    resume = f"checkpoint.resume={held / 'checkpoints/step-00000006'}"
    # Tensors are read once, while they are restored: by then the new run has its tokenizer, and nothing else.
    sentence = refused(["train", str(make_config("new")), resume], tmp_path, allowed="new/tokenizer/")
    assert words in sentence
    assert "step-00000006" in sentence


@pytest.mark.parametrize(("file", "spoil", "words"), SPOILED[1:4])
def test_auto_passes_over_a_spoiled_checkpoint_and_says_so(file, spoil, words, held, finished_run, capsys):
    spoil(held / "checkpoints/step-00000006" / file)
    assert main(["train", str(held.parent / "held.yaml")]) == 0
    err = capsys.readouterr().err
    assert err.count("checkpoint step-00000006 is passed over: ") == 1
    assert words in err
    assert f"resuming from {held / 'checkpoints/step-00000003'} at step 3" in err
    assert runs.timeless(held) == runs.timeless(finished_run)


def test_auto_does_not_start_anew_where_every_checkpoint_is_spoiled(held, refused, tmp_path):
    for step in (held / "checkpoints").glob("step-*"):
        SPOILED[1][1](step / SPOILED[1][0])
    sentence = refused(["train", str(held.parent / "held.yaml")], tmp_path)
    assert "has checkpoints and none is sound" in sentence


def test_resuming_from_what_is_no_training_checkpoint(refused, finished_run, make_config, tmp_path):
    shutil.copytree(finished_run / "checkpoints/latest", tmp_path / "exported")
    shutil.rmtree(tmp_path / "exported/trainer")
    sentence = refused(["train", str(make_config("new")), f"checkpoint.resume={tmp_path / 'exported'}"], tmp_path)
    assert f"{str(tmp_path / 'exported')!r} is no training checkpoint, for it has no trainer/manifest.json" in sentence


def test_resuming_from_another_architecture(refused, finished_run, make_config, tmp_path):
    resume = f"checkpoint.resume={finished_run / 'checkpoints/latest'}"
    argv = ["train", str(make_config("new")), resume, "model.num_hidden_layers=3"]
    assert main(argv) == 2  # the tokenizer of the new run is made; after that nothing is
    sentence = refused(argv, tmp_path)
    assert "model.num_hidden_layers=3 in place of 2" in sentence
    assert not (tmp_path / "new/config.yaml").exists()


def test_no_room_for_a_checkpoint_is_found_before_training(refused, make_config, held, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 1000))
    sentence = refused(["train", str(held.parent / "held.yaml"), "train.max_steps=7"], held)
    assert sentence.startswith(f"no space left for checkpoint {held / 'checkpoints/step-*'}: it needs ")
    argv = ["train", str(make_config("new"))]
    assert main(argv) == 2
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["tokenizer"]
    assert "lower checkpoint.keep_last or move run.dir" in refused(argv, tmp_path)


def test_a_disk_that_fills_up_during_the_run_keeps_what_was_saved(make_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        metrics.MetricsFile,
        "write",
        lambda self, record, write=metrics.MetricsFile.write: write(self, record) if record["step"] < 5 else full(),
    )

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    config = make_config()
    assert main(["train", str(config)]) == 2
    err = capsys.readouterr().err
    run_dir = tmp_path / "run"
    assert err.endswith(f"error: no space left for run.dir={str(run_dir)!r}: free some, or set another run.dir\n")
    monkeypatch.undo()
    assert main(["train", str(config)]) == 0
    assert "at step 3" in capsys.readouterr().err
    assert [record["step"] for record in runs.records(run_dir)] == [1, 2, 3, 4, 5, 6]


def test_a_run_directory_that_may_not_be_written(refused, make_config, tmp_path, monkeypatch):
    """By asking the system: a test that runs as root may write anywhere."""
    monkeypatch.setattr(run_module.os, "access", lambda path, mode: path != tmp_path)
    sentence = refused(["train", str(make_config())], tmp_path)
    assert sentence == f"run.dir={str(tmp_path / 'run')!r} cannot be written: name a directory that you may write to"


def test_damaged_records_are_named_before_training(refused, held):
    lines = (held / "metrics.jsonl").read_text().splitlines()
    lines[1] = lines[1][:-7]
    (held / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    sentence = refused(["train", str(held.parent / "held.yaml"), "train.max_steps=7"], held)
    assert sentence.startswith(f"file {held / 'metrics.jsonl'} is damaged: line 2 is not valid JSON: ")


def test_a_damaged_configuration_of_the_run_is_named(refused, held):
    (held / "config.yaml").write_text("run: {dir: [")
    sentence = refused(["train", str(held.parent / "held.yaml")], held)
    assert sentence.startswith(f"the configuration saved in {held}, line 1 is not valid YAML: ")


def test_evaluating_unusable_text(refused, finished_run, tmp_path):
    checkpoint = str(finished_run / "checkpoints/latest")
    (tmp_path / "bad.txt").write_bytes(b"abc \xff")
    assert "is not UTF-8" in refused(["evaluate", checkpoint, "--data", str(tmp_path / "bad.txt")], tmp_path)
    assert "does not exist" in refused(["evaluate", checkpoint, "--data", str(tmp_path / "none.txt")], tmp_path)


def test_loading_a_spoiled_checkpoint_to_use_it(refused, finished_run, tmp_path):
    checkpoint = Path(shutil.copytree(finished_run / "checkpoints/latest", tmp_path / "copy"))
    truncate(checkpoint / "model.safetensors")
    (tmp_path / "text.txt").write_text("abc")
    evaluate = ["evaluate", str(checkpoint), "--data", str(tmp_path / "text.txt")]
    assert "model.safetensors is truncated" in refused(evaluate, tmp_path)
    assert "model.safetensors" in refused(["generate", str(checkpoint), "--prompt", "abc"], tmp_path)
    shutil.copy(finished_run / "checkpoints/latest/model.safetensors", checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "mixtral"})[:-3])
    assert "config.json" in refused(evaluate, tmp_path)
    assert "config.json" in refused(["generate", str(checkpoint), "--prompt", "abc"], tmp_path)

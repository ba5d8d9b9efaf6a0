"""A run whose files are damaged is refused in one sentence, or its resumption computes what a sound one would."""

import shutil
from pathlib import Path

import pytest
from support import runs
from support.damage import damage

from moe_llm.cli import main
from moe_llm.train.metrics import read_metrics

STEPS = 7


def copied(finished_run: Path, target: Path) -> Path:
    """A run of its own, with a run.yaml beside it."""
    run = runs.copy_run(finished_run, target)
    text = (finished_run / "config.yaml").read_text().replace(str(finished_run), str(run))
    (run / "config.yaml").write_text(text)
    (run.parent / "run.yaml").write_text(text)
    return run


def resumed(run: Path) -> int:
    """The exit code of one step more than the run has."""
    return main(["train", str(run.parent / "run.yaml"), f"train.max_steps={STEPS}"])


@pytest.fixture(scope="module")
def sound_losses(finished_run, tmp_path_factory):
    """Of the seventh step, from the newest checkpoint and from the one before, where nothing is damaged."""
    losses = []
    for lost in ((), ("step-00000006",)):
        run = copied(finished_run, tmp_path_factory.mktemp("sound") / "run")
        for name in lost:
            shutil.rmtree(run / "checkpoints" / name)
        assert resumed(run) == 0
        losses.append(read_metrics(run / "metrics.jsonl")[-1]["loss"])
    return losses


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 200), marks=pytest.mark.grid)])
def test_train_refuses_a_damaged_checkpoint_or_computes_what_a_sound_one_gives(
    finished_run, sound_losses, tmp_path, capsys, seeds
):
    for seed in seeds:
        run = copied(finished_run, tmp_path / f"{seed}/run")
        if seed % 2:  # the damaged one is the only one
            shutil.rmtree(run / "checkpoints/step-00000003")
        what = damage(run / "checkpoints/step-00000006", finished_run / "checkpoints/step-00000003", seed)
        code, err = resumed(run), capsys.readouterr().err
        assert code in (0, 2), (what, err)
        if code == 2:
            assert err.count("moe-llm: error: ") == 1, (what, err)
            assert "Traceback" not in err, (what, err)
        else:
            assert read_metrics(run / "metrics.jsonl")[-1]["loss"] in sound_losses, what
        shutil.rmtree(run)


@pytest.mark.parametrize("content", [b"\xff\xfe\n{}\n", b"[]\n{}\n", b'{"starts": 3}'])
@pytest.mark.parametrize("file", ["metrics.jsonl", "facts.json", "config.yaml", "checkpoints/checkpoints.json"])
def test_what_is_damaged_beside_the_checkpoints_stops_no_run_without_a_sentence(
    finished_run, sound_losses, tmp_path, capsys, file, content
):
    run = copied(finished_run, tmp_path / "copy/run")
    (run / file).write_bytes(content)
    code, err = resumed(run), capsys.readouterr().err
    if file in ("metrics.jsonl", "config.yaml"):
        assert code == 2
        assert err.count("moe-llm: error: ") == 1
        assert str(run) in err
    else:
        assert code == 0
        assert read_metrics(run / "metrics.jsonl")[-1]["loss"] == sound_losses[0]
        assert file != "facts.json" or (run / "facts.damaged.json").read_bytes() == content

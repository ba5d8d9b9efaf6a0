"""A run resumes on the data, the tokenizer and the settings that it was trained with, or says what has changed."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from support import runs

from moe_llm.checkpoint.state import read_provenance
from moe_llm.cli import main


@pytest.fixture
def text(corpus, tmp_path) -> Path:
    return Path(shutil.copy(corpus, tmp_path / "text.txt"))


def config_for(tmp_path, text, name: str = "run", *, cache: str = "cache", **changes) -> str:
    raw = runs.sections(text, tmp_path / cache, tmp_path / name, **changes)
    return str(runs.write_yaml(tmp_path / f"{name}.yaml", raw))


def more(config: str, *overrides: str) -> int:
    return main(["train", config, "train.max_steps=8", *overrides])


CHANGES = {
    "a reversed third": lambda lines: lines[: len(lines) // 3][::-1],
    "four lines in front": lambda lines: ["one\n", "two\n", "three\n", "four\n", *lines],
    "one character": lambda lines: [*lines[:-1], lines[-1].replace("e", "a", 1)],
    "nothing but a longer end": lambda lines: [*lines, "and more\n"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_text_is_refused_by_the_source_and_accepted_when_allowed(tmp_path, text, capsys, change):
    config = config_for(tmp_path, text)
    assert main(["train", config]) == 0
    first = read_provenance(tmp_path / "run/checkpoints/latest")
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    text.write_text("".join(CHANGES[change](lines)), encoding="utf-8")
    capsys.readouterr()
    assert more(config) == 2
    error = capsys.readouterr().err
    assert "trained on other data: data.sources.0 (" in error
    assert "data.allow_changed=true" in error
    assert len(runs.records(tmp_path / "run")) == 6, "nothing has been trained"

    assert more(config, "data.allow_changed=true") == 0
    after = read_provenance(tmp_path / "run/checkpoints/latest")
    assert after["data"] != first["data"]
    assert {entry["step"] for entry in after["changes"]} == {6}
    assert after["changes"][0]["change"].startswith("data.sources.0 (")
    starts = json.loads((tmp_path / "run/facts.json").read_text())["starts"]
    assert [[list(part.values()) for part in start["data"]] for start in starts] == [first["data"], after["data"]]


def test_a_copy_of_the_text_elsewhere_is_the_same_data(tmp_path, text):
    config = config_for(tmp_path, text)
    assert main(["train", config]) == 0
    moved = tmp_path / "elsewhere.txt"
    text.rename(moved)
    for path in (tmp_path / "run/config.yaml", Path(config)):
        path.write_text(path.read_text().replace(str(text), str(moved)))
    shutil.rmtree(tmp_path / "cache")
    assert more(config) == 0


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path, text, capsys):
    assert main(["train", config_for(tmp_path, text, "old")]) == 0
    source = tmp_path / "old/checkpoints/latest"
    resume = f"checkpoint.resume={source}"

    def refused(config: str, *overrides: str) -> str:
        capsys.readouterr()
        assert more(config, resume, *overrides) == 2
        assert not list(tmp_path.glob("[fn]*/checkpoints/step-*"))
        return capsys.readouterr().err

    same_tokenizer = f"tokenizer.path={source}"
    assert "run.seed=12 in place of" in refused(config_for(tmp_path, text, "new", run={"seed": 12}), same_tokenizer)
    other = config_for(tmp_path, text, "new", model={**runs.MODEL, "router_aux_loss_coef": 0.5})
    assert "model.router_aux_loss_coef=0.5 in place of" in refused(other, same_tokenizer)
    assert "another tokenizer" in refused(config_for(tmp_path, text, "fresh", tokenizer={"train_bytes": 2000}))
    half = tmp_path / "half.txt"
    half.write_text(text.read_text()[: 2 * len(text.read_text()) // 3])
    assert "other data: data.sources.0" in refused(config_for(tmp_path, half, "new"), same_tokenizer)


def test_what_may_change_from_a_named_checkpoint_on_is_recorded(tmp_path, text):
    assert main(["train", config_for(tmp_path, text, "old")]) == 0
    source = tmp_path / "old/checkpoints/latest"
    config = config_for(tmp_path, text, "new", optim={"lr": 1e-4})
    assert more(config, f"checkpoint.resume={source}", f"tokenizer.path={source}") == 0
    changes = read_provenance(tmp_path / "new/checkpoints/latest")["changes"]
    assert any(entry["change"].startswith("optim.lr=0.0001 in place of") for entry in changes)


def test_other_settings_are_compared_with_the_checkpoint_itself_and_recorded_where_allowed(held, capsys):
    config = str(held.parent / "held.yaml")
    (held / "config.yaml").unlink()
    assert more(config, "model.router_aux_loss_coef=0.5") == 2
    assert "is of a run with another setting: model.router_aux_loss_coef=0.5 in place of" in capsys.readouterr().err
    assert more(config, "data.sequence_length=16") == 2
    assert "data.allow_changed=true" in capsys.readouterr().err
    assert more(config, "data.sequence_length=16", "data.allow_changed=true") == 0
    changes = read_provenance(held / "checkpoints/latest")["changes"]
    assert changes == [{"step": 6, "change": "data.sequence_length=16 in place of 32"}]


@pytest.mark.grid
def test_ranks_that_read_different_files_do_not_train(tmp_path, text):
    """Each rank has a path of its own, as on nodes with a half-synchronised copy."""
    for rank in (0, 1):
        folder = tmp_path / f"node{rank}"
        folder.mkdir()
        lines = text.read_text().splitlines(keepends=True)
        (folder / "text.txt").write_text("".join(lines[: len(lines) - 40 * rank]))
    raw = runs.sections(Path("text.txt"), tmp_path / "cache", tmp_path / "run")
    config = runs.write_yaml(tmp_path / "run.yaml", raw)
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\n"
        f"os.chdir({str(tmp_path)!r} + '/node' + os.environ['RANK'])\n"
        "from moe_llm.cli import main\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    command = runs.launched(config)
    command = [str(script) if part.endswith("scripts/train.py") else part for part in command]
    with runs.started(command) as process:
        _, err = process.communicate(timeout=120)
    assert "rank 1 reads other data than rank 0: data.sources.0" in err
    (tmp_path / "node1/text.txt").unlink()
    with runs.started(command) as process:
        _, err = process.communicate(timeout=120)
    assert "rank 1: data.sources.0.path=text.txt does not exist" in err
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    assert yaml.safe_load(config.read_text())["data"]["sources"][0]["path"] == "text.txt"

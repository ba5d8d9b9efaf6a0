"""Damaged weights are refused by their tensor, or their file, by every command that reads them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.damage import damage

from moe_llm.cli import main


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text("some words of text\n" * 20)
    return tmp_path / "text.txt"


def commands(checkpoint: Path, other: Path, text: Path, tmp_path: Path) -> dict[str, list[str]]:
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (checkpoint, other)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"merge_method": "linear", "models": models, "dtype": "float32"}))
    return {
        "evaluate": ["evaluate", str(checkpoint), "--data", str(text)],
        "generate": ["generate", str(checkpoint), "--prompt", "some", "--max-new-tokens", "2"],
        "inspect": ["inspect", str(checkpoint), "--data", str(text)],
        "diff": ["diff", str(other), str(checkpoint)],
        "merge": ["merge", str(recipe), str(tmp_path / "merged")],
    }


COMMANDS = ["evaluate", "generate", "inspect", "diff", "merge"]


@pytest.mark.parametrize("command", COMMANDS)
def test_one_flipped_exponent_bit_of_a_runs_checkpoint_is_refused(finished_run, text, tmp_path, capsys, command):
    other = finished_run / "checkpoints/latest"
    copy = Path(shutil.copytree(other, tmp_path / "copy"))
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 0x40
    (copy / "model.safetensors").write_bytes(content)
    assert main(commands(copy, other, text, tmp_path)[command]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model.safetensors" in error
    assert "is damaged" in error
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_weight_that_is_not_finite_is_named(finished_run, text, tmp_path, capsys, command, value):
    """Of a directory without a manifest, as merges and other programs write it."""
    other = finished_run / "checkpoints/latest"
    copy = Path(shutil.copytree(other, tmp_path / "copy"))
    shutil.rmtree(copy / "trainer")
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name][0, 0] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert main(commands(copy, other, text, tmp_path)[command]) == 2
    assert f"tensor {name} of " in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_loss_that_is_not_finite_is_no_result(finished_run, text, tmp_path, capsys):
    copy = Path(shutil.copytree(finished_run / "checkpoints/latest", tmp_path / "copy"))
    shutil.rmtree(copy / "trainer")
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], 3e38)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert main(["evaluate", str(copy), "--data", str(text), "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no finite loss" in err
    for how in ([], ["--temperature", "0"]):
        assert main(["generate", str(copy), "--prompt", "some", "--max-new-tokens", "2", *how]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "gives NaN or infinity for the next token" in err


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 200), marks=pytest.mark.grid)])
def test_damaged_checkpoints_end_in_one_sentence_or_are_harmless(finished_run, text, tmp_path, capsys, seeds):
    """No traceback, no NaN written: every command answers 0 or 2, and 2 with one sentence."""
    good = finished_run / "checkpoints/latest"
    for seed in seeds:
        copy = Path(shutil.copytree(good, tmp_path / f"copy{seed}"))
        damage(copy, finished_run / "checkpoints/step-00000003", seed, (".safetensors", ".json"))
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        for name, command in commands(copy, good, text, tmp_path).items():
            code = main(command)
            out, err = capsys.readouterr()
            assert code in (0, 2), (seed, name, err)
            assert code == 0 or err.count("moe-llm: error: ") == 1, (seed, name, err)
            assert "nan" not in out.lower().replace("finance", ""), (seed, name)
        shutil.rmtree(copy)

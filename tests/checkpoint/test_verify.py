"""`moe-llm verify`: every byte and every number of a checkpoint."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_llm.checkpoint.digests import FileRecord
from moe_llm.checkpoint.manifest import adopt_file, write_json, write_manifest
from moe_llm.cli import main


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint's files, by a manifest."""
    directory = tmp_path / "step-00000001"
    (directory / "trainer").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    save_file({"a": torch.randn(30, generator=generator), "n": torch.arange(3)}, directory / "model.safetensors")
    save_file({"m": torch.randn(9, generator=generator)}, directory / "trainer/optimizer-00001-of-00001.safetensors")
    write_json(directory / "config.json", {"model_type": "mixtral"})
    records: dict[str, FileRecord] = {
        str(file.relative_to(directory)): adopt_file(file) for file in directory.rglob("*") if file.is_file()
    }
    index = {"weight_map": {"m": "optimizer-00001-of-00001.safetensors"}}
    name = "trainer/optimizer.safetensors.index.json"
    write_manifest(directory, records | {name: write_json(directory / name, index)})
    return directory


def test_a_sound_checkpoint_is_verified(checkpoint, capsys):
    assert main(["verify", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"files": 4, "tensors": 3, "nbytes": 4 * 30 + 8 * 3 + 4 * 9}


def test_any_flipped_bit_is_found_and_its_file_named(checkpoint, tmp_path, capsys):
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"):
        for place in (0, file.stat().st_size // 2, file.stat().st_size - 1):
            damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
            content = bytearray(file.read_bytes())
            content[place] ^= 64
            (damaged / file.relative_to(checkpoint)).write_bytes(content)
            assert main(["verify", str(damaged)]) == 2
            assert str(damaged / file.relative_to(checkpoint)) in capsys.readouterr().err
            shutil.rmtree(damaged)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_without_a_manifest_a_tensor_that_is_not_finite_is_named(checkpoint, value, capsys):
    shutil.rmtree(checkpoint / "trainer")
    assert main(["verify", str(checkpoint)]) == 0
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["a"][29] = value
    save_file(tensors, checkpoint / "model.safetensors")
    capsys.readouterr()
    assert main(["verify", str(checkpoint)]) == 2
    assert "tensor a of" in capsys.readouterr().err

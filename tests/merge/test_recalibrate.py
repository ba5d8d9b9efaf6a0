"""Routers of a merge: kept from one model, or fitted on text with all else as it is."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support import runs

from moe_llm.checkpoint.folder import complete_checkpoints
from moe_llm.cli import main
from moe_llm.evaluation.evaluate import evaluate_files

SETTINGS = {"steps": 20, "lr": 0.03, "batch_size": 4, "sequence_length": 32}


def weights(directory):
    return load_file(directory / "model.safetensors")


def is_router(name):
    return name.endswith("block_sparse_moe.gate.weight")


@pytest.fixture(scope="module")
def parents(corpus, cache, tmp_path_factory):
    """A model that has learned something, and a copy whose routers are spoilt: they send all tokens one way."""
    root = tmp_path_factory.mktemp("parents")
    raw = runs.sections(
        corpus,
        cache,
        root / "run",
        train={"max_steps": 60, "global_batch_size": 8},
        optim={"lr": 1e-2},
        checkpoint={"every_steps": None},
        logging={"console": "off"},
    )
    assert main(["train", str(runs.write_yaml(root / "run.yaml", raw))]) == 0
    trained = complete_checkpoints(root / "run/checkpoints")[0]
    spoilt = shutil.copytree(trained, root / "spoilt")
    shutil.rmtree(spoilt / "trainer")  # whose manifest would tell that the weights have been changed
    generator = torch.Generator().manual_seed(0)
    changed = {
        name: 3 * torch.randn(tensor.shape, generator=generator) if is_router(name) else tensor
        for name, tensor in weights(trained).items()
    }
    save_file(changed, spoilt / "model.safetensors", {"format": "pt"})
    return trained, spoilt


def recipe_file(tmp_path, parents, name="recipe", text=None, settings=None, **more):
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": 1.0}} for model in parents],
        **more,
    }
    if text is not None:
        recipe["recalibrate"] = {"text": [str(text)], **SETTINGS, **(settings or {})}
    return runs.write_yaml(tmp_path / f"{name}.yaml", recipe)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_routers_change_and_the_loss_falls(parents, corpus, tmp_path, capsys, dtype):
    outs = [tmp_path / name for name in ("merged", "fitted", "again")]
    for out, text in zip(outs, (None, corpus, corpus), strict=True):
        config = recipe_file(tmp_path, parents, out.name, text, dtype=dtype)
        assert main(["merge", str(config), str(out), "--max-shard-size", "5GB"]) == 0
    merged, fitted, again = map(weights, outs)
    changed = {name for name in merged if not torch.equal(merged[name], fitted[name])}
    assert changed == {name for name in merged if is_router(name)}
    assert {tensor.dtype for tensor in fitted.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(fitted[name], again[name]) for name in fitted)
    unlike = {file.name for file in outs[0].iterdir() if file.read_bytes() != (outs[1] / file.name).read_bytes()}
    assert unlike == {"model.safetensors", "merge_recipe.yaml"}
    assert yaml.safe_load((outs[1] / "merge_recipe.yaml").read_text())["recalibrate"]["steps"] == 20
    before, after = (evaluate_files(out, [str(corpus)])["loss"] for out in outs[:2])
    assert after < before
    told = [line for line in capsys.readouterr().err.splitlines() if "routers recalibrated" in line]
    assert len(told) == 2
    assert told[0] == told[1]
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(outs[1], output_loading_info=True)
    assert not any(info.values()), info
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("key", ["steps", "lr", "batch_size", "sequence_length"])
def test_each_setting_acts(parents, corpus, tmp_path, key):
    found = []
    for name, settings in (("as_set", {}), ("otherwise", {key: {"lr": 0.01}.get(key, SETTINGS[key] // 2)})):
        config = recipe_file(tmp_path, parents, name, corpus, settings=settings)
        assert main(["merge", str(config), str(tmp_path / name)]) == 0
        found.append(weights(tmp_path / name))
    routers = [name for name in found[0] if is_router(name)]
    assert not all(torch.equal(found[0][name], found[1][name]) for name in routers)


def test_a_fit_that_does_not_help_is_not_kept(parents, corpus, tmp_path, capsys):
    trained, _ = parents
    for name, text in (("merged", None), ("fitted", corpus)):
        config = recipe_file(tmp_path, [trained], name, text, settings={"lr": 1e4, "steps": 2})
        assert main(["merge", str(config), str(tmp_path / name)]) == 0
    assert "routers as merged, for the fit does not help" in capsys.readouterr().err
    merged, fitted = weights(tmp_path / "merged"), weights(tmp_path / "fitted")
    assert all(torch.equal(merged[name], fitted[name]) for name in merged)


@pytest.mark.parametrize(("settings", "more", "words"), [
    ({"text": ["nowhere.txt"]}, {}, "recalibrate.text"),
    ({"text": []}, {}, "recalibrate.text"),
    ({"batch_size": 4000}, {}, "too few for 8 batches of batch_size=4000"),
    ({"step": 3}, {}, "unknown key recalibrate.step: did you mean steps?"),
    ({}, {"merge_method": "greedy_soup", "data": ["x"]}, "recalibrate"),
])  # fmt: skip
def test_what_cannot_be_fitted_is_refused(parents, corpus, tmp_path, capsys, settings, more, words):
    config = recipe_file(tmp_path, parents, "bad", corpus, settings=settings, **more)
    assert main(["merge", str(config), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_routers_are_kept_from_one_model(parents, tmp_path):
    """By a filter on their name: `gate.` is of no expert's matrix, in published names and in transformers'."""
    trained, spoilt = parents
    noisy = shutil.copytree(trained, tmp_path / "noisy")
    shutil.rmtree(noisy / "trainer")
    save_file({name: tensor + 0.01 for name, tensor in weights(trained).items()}, noisy / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    for word in ("block_sparse_moe.gate.", "mlp.gate."):
        models = [
            {"model": str(model), "parameters": {"weight": [{"filter": word, "value": share}, {"value": 1.0}]}}
            for model, share in ((noisy, 0.0), (spoilt, 1.0))
        ]
        config = runs.write_yaml(tmp_path / "r.yaml", {"merge_method": "linear", "models": models})
        out = tmp_path / f"out-{word}"
        assert main(["merge", str(config), str(out)]) == 0
        first, second = weights(noisy), weights(spoilt)
        for name, tensor in weights(out).items():
            expected = second[name] if is_router(name) else (first[name] + second[name]) / 2
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)

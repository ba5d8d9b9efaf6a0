"""What an ensemble's file may say, and how mistakes in it are told."""

import json
from pathlib import Path

import pytest
import yaml
from ensemble_fakes import members, write
from safetensors.torch import load_file, save_file

from moe_llm import cli
from moe_llm.ensemble.recipe import METHODS, parse_recipe, recipe_text
from moe_llm.errors import UserError

TWO = members("x", "y")
MISTAKES = [
    ({"members": TWO}, "it needs at least method and members"),
    ({"method": "vote", "members": TWO}, "method='vote' is no method: use one of linear, log_linear"),
    ({"method": "linear"}, "members is missing: add it"),
    ({"method": "linear", "members": []}, "members=[] is refused"),
    ({"method": "linear", "members": [{"modle": "x"}]}, "members.0.model is missing"),
    ({"method": "linear", "members": [{"model": "x", "wieght": 1}]}, "members.0.wieght: did you mean weight?"),
    ({"method": "linear", "members": members("x", "y", weight=[1, -1])}, "members.1.weight=-1.0 is negative"),
    ({"method": "linear", "members": members("x", "y", weight=[0, 0])}, "of which none counts"),
    ({"method": "log_linear", "members": [{"model": "x", "weight": 1}, {"model": "y"}]}, "members.1.weight=None is"),
    ({"method": "linear", "members": members("x", weight=[1]), "weights": "fit"}, "would be fitted anyway"),
    ({"method": "linear", "members": TWO, "data": ["t"]}, "data=['t'] has no effect, for nothing is to be fitted"),
    ({"method": "linear", "members": TWO, "max_blocks": 3}, "max_blocks=3 has no effect"),
    ({"method": "linear", "members": [{"model": "x", "dtype": "int8"}]}, "members.0.dtype='int8' is refused"),
    ({"method": "linear", "members": [{"model": "x", "role": "core"}]}, "unknown key members.0.role"),
    ({"method": "experts", "members": members("x", role=["core"])}, "members=['core'] leaves nothing to add"),
    ({"method": "experts", "members": members("x", role=["positive"])}, "are roles without core"),
    ({"method": "experts", "members": members("x", "y", role=["core", "core"])}, "members.1.role='core' is taken"),
    ({"method": "experts", "members": members("x", "y", role=["core", "negative"]), "lambda": "much"},
     "lambda='much' is no number: give a number or fit"),
    ({"method": "cascade", "members": members("x", "y", role=["small", "large"])}, "is missing, and so is budget"),
    ({"method": "cascade", "members": members("x", "y", role=["small", "large"]), "threshold": 0.5, "budget": 0.5},
     "is given, and so is budget"),
    ({"method": "cascade", "members": members("x", "y", role=["small", "large"]), "threshold": 1.5}, "threshold=1.5"),
    ({"method": "cascade", "members": members("x", role=["small"]), "threshold": 0.5}, "are roles without large"),
    ({"method": "stacking", "members": members("x", "y", role=["first", "second"]), "template": "{input}"},
     "template='{input}' lacks {output}"),
    ({"method": "self_refine", "members": members("x", role=["writer"]), "rounds": 0}, "rounds=0 is refused"),
    ({"method": "self_refine", "members": members("x", role=["writer"]), "revise": "{draft}"}, "lacks {critique}"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), MISTAKES, ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_one_sentence(content, words):
    with pytest.raises(UserError) as error:
        parse_recipe(content, "file.yaml")
    assert words in str(error.value)
    assert str(error.value).startswith("file.yaml")
    assert "\n" not in str(error.value)


def test_weights_of_a_mixture_are_relative_and_equal_where_none_are_given():
    def shares(**keys):
        return parse_recipe({"method": "linear", "members": members("x", "y", **keys)}).shares

    assert shares(weight=[3, 1]) == [0.75, 0.25]
    assert shares() == [0.5, 0.5]
    assert parse_recipe({"method": "log_linear", "members": members("x", "y", weight=[3, -1])}).shares == [3, -1]


@pytest.mark.parametrize("method", METHODS)
def test_a_written_recipe_reads_as_it_was(method):
    roles = {"experts": ["core", "negative"], "cascade": ["small", "large"], "stacking": ["first", "second"],
             "self_refine": ["writer", "critic"]}.get(method)  # fmt: skip
    keys = {"experts": {"lambda": 1 / 3}, "cascade": {"threshold": 1e-5}}.get(method, {})
    columns = {"role": roles} if roles else {"weight": [0.1 + 0.2, 1e-9]} if method in ("linear", "log_linear") else {}
    alone = method in ("mc_dropout", "edits")  # one model, run many times
    given = [{"model": "x"}] if alone else members("x", "y", **columns)
    recipe = parse_recipe({"method": method, "members": given, **keys})
    assert parse_recipe(yaml.safe_load(recipe_text(recipe))) == recipe


def run(*argv: str, capsys) -> str:
    """The one line on stderr of a command that refuses."""
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moe-llm: error: ")
    assert err.count("\n") == 1
    return err


def test_the_command_line_refuses_before_anything_is_loaded(models, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moe_llm.ensemble.models.load_causal_lm", lambda *_: pytest.fail("too late"))
    a, b = models["a"], models["b"]
    generate, evaluate = ["generate", "--prompt", "p"], ["evaluate", "--data", text]
    assert "neither CHECKPOINT nor --ensemble" in run(*generate, capsys=capsys)
    assert "both CHECKPOINT and --ensemble" in run(*evaluate, "--ensemble", "e", "--", "c", capsys=capsys)
    assert "does not exist" in run(*generate, "--ensemble", str(tmp_path / "none.yaml"), capsys=capsys)
    gone = write(tmp_path / "gone.yaml", "linear", members(a, str(tmp_path / "gone")))
    assert "gone' does not exist" in run(*generate, "--ensemble", gone, capsys=capsys)
    for name in ("tpu:9", "meta"):
        device = write(tmp_path / "device.yaml", "linear", members(a, b, device=["cpu", name]))
        assert f"members.1.device={name!r} cannot be used" in run(*generate, "--ensemble", device, capsys=capsys)
    unfitted = write(tmp_path / "unfitted.yaml", "linear", members(a, b), weights="fit")
    assert "weights=fit needs data" in run(*generate, "--ensemble", unfitted, capsys=capsys)
    stacking = write(tmp_path / "stacking.yaml", "stacking", members(a, b, role=["first", "second"]))
    assert "gives a text no probability" in run(*evaluate, "--ensemble", stacking, capsys=capsys)
    out = tmp_path / "out.yaml"
    assert "has nothing to fit" in run("ensemble", "fit", stacking, str(out), "--data", text, capsys=capsys)
    assert "exists already" in run("ensemble", "fit", unfitted, stacking, "--data", text, capsys=capsys)
    assert "no directory" in run("ensemble", "fit", unfitted, str(tmp_path / "no/x"), "--data", text, capsys=capsys)
    nothing = str(tmp_path / "*.none")
    sound = write(tmp_path / "sound.yaml", "linear", members(a, b))
    said = f"--data={nothing} matches no file"
    assert said in run("ensemble", "fit", sound, str(out), "--data", nothing, capsys=capsys)
    assert said in run("evaluate", "--ensemble", sound, "--data", nothing, capsys=capsys)
    textless = write(tmp_path / "textless.yaml", "linear", members(a, b), weights="fit", data=[nothing])
    assert f"textless.yaml: data={nothing} matches no file" in run(*generate, "--ensemble", textless, capsys=capsys)
    cascade = write(tmp_path / "cascade.yaml", "cascade", members(a, b, role=["small", "large"]), threshold=0.5)
    assert "leaves nothing to fit" in run("ensemble", "fit", cascade, str(out), "--data", text, capsys=capsys)
    assert not out.exists()


def test_a_damaged_member_is_refused(models, text, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (damaged / name).write_bytes(Path(models["a"], name).read_bytes())
    (damaged / "model.safetensors").write_bytes(b"nothing")
    file = write(tmp_path / "damaged.yaml", "linear", members(models["a"], str(damaged)))
    assert "cannot be loaded" in run("evaluate", "--ensemble", file, "--data", text, capsys=capsys)
    whole = load_file(Path(models["a"], "model.safetensors"))
    name = max(whole)
    del whole[name]
    save_file(whole, damaged / "model.safetensors", {"format": "pt"})
    assert f"lacks {name}" in run("evaluate", "--ensemble", file, "--data", text, capsys=capsys)
    whole = load_file(Path(models["a"], "model.safetensors"))
    whole[name].view(-1)[-1] = float("inf")
    save_file(whole, damaged / "model.safetensors", {"format": "pt"})
    said = run("evaluate", "--ensemble", file, "--data", text, capsys=capsys)
    assert f"tensor {name} of {damaged} holds NaN or infinity" in said
    assert f"tensor {name} of {damaged} holds NaN" in run("generate", str(damaged), "--prompt", "a", capsys=capsys)
    config = json.loads((damaged / "config.json").read_text())
    for key, value in (("rms_norm_eps", float("nan")), ("num_experts_per_tok", 5)):
        (damaged / "config.json").write_text(json.dumps(config | {"num_local_experts": 4, key: value}))
        said = run("generate", str(damaged), "--prompt", "a", capsys=capsys)
        assert f"{key}={value} in its config.json is not possible" in said
    twice = write(tmp_path / "twice.yaml", "cascade",
                  members(models["a"], models["a"], role=["small", "large"]), threshold=0.5)  # fmt: skip
    assert "give a cascade two checkpoints" in run("evaluate", "--ensemble", twice, "--data", text, capsys=capsys)

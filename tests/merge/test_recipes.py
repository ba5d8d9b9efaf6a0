"""Mistakes in recipes and models: one sentence, exit code 2, nothing left behind. And what runs all the same."""

import json
import os
import shutil

import pytest
import torch
import yaml
from merge_fakes import Words, make_model, merged, model_list, save, write_shards
from safetensors.torch import load_file

from moe_llm import cli
from moe_llm.errors import UserError
from moe_llm.merge import write as write_module
from moe_llm.merge.parameters import Parameter, resolve
from moe_llm.merge.recipe import parse_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Names of models beside the one recipes start from: b a fine-tune, and such as do not fit."""
    root = tmp_path_factory.mktemp("models")
    base = make_model()
    save(base, root / "a")
    save(make_model(seed=1, base=base), root / "b")
    save(make_model(num_hidden_layers=2), root / "short")
    save(make_model(vocab_size=30), root / "words")
    save(make_model(intermediate_size=10), root / "wide")
    save(make_model(num_local_experts=3), root / "three")
    save(make_model(num_attention_heads=4, num_key_value_heads=2), root / "heads")
    save(make_model("llama"), root / "llama")
    for name in ("lacking", "extra", "integers"):
        state = load_file(shutil.copytree(root / "a", root / name) / "model.safetensors")
        if name == "lacking":
            del state["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
        elif name == "extra":
            state["model.layers.0.self_attn.q_proj.bias"] = torch.ones(8)
        else:
            state["model.norm.weight"] = torch.ones(8, dtype=torch.int64)
        write_shards(root / name, state)
    for name, change in {"worded": {"hidden_size": "x"}, "headless": {"num_attention_heads": None}}.items():
        config = shutil.copytree(root / "a", root / name) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    (root / "empty").mkdir()
    return root


def two(method="linear", other="b", **changes):
    parameters = {"slerp": {"t": 0.5}}.get(method, {"weight": 0.5})
    base = {} if method in ("linear", "passthrough") else {"base_model": "a"}
    recipe = {"merge_method": method, "models": model_list("a", other), "parameters": parameters}
    return recipe | base | changes


def stack(*layers, method="passthrough"):
    sources = [{"sources": [{"model": "a", "layer_range": list(pair)}]} for pair in layers]
    return {"merge_method": method, "slices": sources}


BAD = {
    "no method": ({"models": []}, "merge_method is missing"),
    "an unknown method": (two("tiez"), r"merge_method='tiez' is not known: did you mean ties\?"),
    "an unknown key": (two(base_modle="a"), r"unknown key base_modle: did you mean base_model\?"),
    "an unknown parameter": (two(parameters={"wieght": 1.0}), r"unknown parameter wieght: did you mean weight\?"),
    "modules": ({"merge_method": "linear", "modules": {"x": {}}}, "modules is not supported"),
    "no models": ({"merge_method": "linear"}, "exactly one of models and slices"),
    "both": (two() | stack((0, 1)), "exactly one of models and slices"),
    "no list": (["a"], "is no recipe"),
    "a missing model": (two(other="nowhere"), "model 'nowhere' does not exist"),
    "an empty directory": (two(other="empty"), "model 'empty' is empty"),
    "a LoRA": (two(other="b+c"), "adds a LoRA"),
    "a hub name offline": (two(other="someone/model"), "someone/model.*cannot be fetched"),
    "a filter for nothing": (
        two(parameters={"weight": [{"filter": "self_atn", "value": 1}, {"value": 0.5}]}), "filter='self_atn' is in no"
    ),
    "a filter that leaves some out": (
        two(parameters={"weight": [{"filter": "self_attn", "value": 1}]}), "weight is missing for model.embed_tokens"
    ),
    "a wrong setting": (two(parameters={"weight": "much"}), "weight='much' is no setting"),
    "a wrong value": (two(parameters={"weight": [{"value": "much"}]}), "weight.value='much' is no number"),
    "no weight": (two(parameters={}), "weight is missing for model.embed_tokens.weight of a"),
    "weights of sum 0": (two(models=model_list("a", "b", weight=[1, -1]), parameters={}), "weight adds up to 0"),
    "too dense": (two("ties", parameters={"weight": 1.0, "density": 1.5}), "density=1.5 .* from 0 to 1"),
    "negative density": (two("dare_ties", parameters={"weight": 1, "density": -0.1}), "density=-0.1 .* from 0 to 1"),
    "an endless weight": (two(parameters={"weight": float("inf")}), "weight=inf .* is not finite: give a number"),
    "no number at all": (two("slerp", parameters={"t": float("nan")}), "t=nan .* is not finite: give a number"),
    "a number for a switch": (two("ties", parameters={"weight": 1, "normalize": 3}), "normalize=3 .* true or false"),
    "no base": (two("ties", base_model=None), "base_model is missing, and ties needs it"),
    "no t": (two("slerp", parameters={}), "t is missing"),
    "three for slerp": (two("slerp", models=model_list("a", "b", "three")), "slerp takes 2 models, and 3|experts"),
    "two to pass through": (two("passthrough", parameters={}), "passthrough takes 0?1? ?(to )?1 models"),
    "twice the same": (two(other="a"), "model 'a' is an input twice"),
    "other layers": (two(other="short"), "different numbers of layers .*a has 3, short has 2"),
    "other words": (two(other="words"), r"embed_tokens.weight is \[24, 8\] in a and \[30, 8\] in words: set tokenizer"),
    "wider experts": (two(other="wide"), r"layers.0.mlp.experts.gate_up_proj is \[4, 12, 8\] in a and \[4, 20, 8\] in"),
    "fewer experts": (two(other="three"), r"gate.weight is \[4, 8\] in a and \[3, 8\] in three"),
    "other heads": (two(other="heads"), "num_attention_heads is 4 in heads and 2 in a"),
    "another kind": (two(other="llama"), "llama is a LlamaForCausalLM and a a MixtralForCausalLM"),
    "a missing tensor": (two(other="lacking"), "lacking lacks the tensor .*layers.1.block_sparse_moe.experts.2.w3"),
    "an unknown tensor": (two(other="extra"), "extra holds the tensor .*q_proj.bias"),
    "a size in words": (two(other="worded"), "hidden_size='x' is no number from 1 upwards"),
    "no heads": (two(other="headless"), "num_attention_heads=None is no number from 1 upwards"),
    "no floats": (two(other="integers"), "integers: tensor model.norm.weight is torch.int64"),
    "beyond the layers": (stack((0, 2), (1, 4)), r"layer_range=\[1, 4\] of a goes beyond its 3 layers"),
    "backwards": (stack((2, 1)), "holds no layers"),
    "uneven layers": (
        {"merge_method": "linear", "slices": [{"sources": [
            {"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 1]}]}]},
        r"sources=\[2, 1\] are numbers of layers that differ",
    ),
    "an unknown dtype": (two(dtype="int4"), "dtype='int4' is no dtype"),
    "an unknown output dtype": (two(out_dtype="float8"), "out_dtype='float8' is no dtype"),
    "half a template": (two(chat_template="{% for m in %}{{ x"), "is no Jinja template"),
    "no template": (two(chat_template="chatml"), "chat_template='chatml' is no template"),
    "no tokenizer": (two(tokenizer_source="union"), "tokenizer of a cannot be loaded"),
    "two tokenizers": (two(tokenizer_source="base", tokenizer={"source": "base"}), "says the same as tokenizer"),
    "tokens": (two(tokenizer={"source": "base", "tokens": {}}), "unknown key tokenizer.tokens"),
    "alignment of what": (two(align_experts="weigths"), "align_experts='weigths' is refused"),
    "no text": (two(align_experts="activations"), "align_text"),
    "text for nothing": (two(align_text=["x"]), "align_text"),
    "text that is missing": (
        two(align_experts="activations", align_text=["x.txt"]), "align_text=x.txt does not exist"
    ),
    "neurons alone": (two(align_neurons=True), "align_neurons=True has no effect without align_experts"),
    "dense experts": (
        {"merge_method": "linear", "models": model_list("llama", "llama2", weight=1), "align_experts": "weights"},
        "needs mixtures, and llama is dense",
    ),
    "a run that is none": ({"merge_method": "checkpoint_average", "run": "a"}, "run='a' has no complete checkpoints"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_sentence_and_nothing_is_written(models, name, monkeypatch, capsys):
    monkeypatch.chdir(models)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if not (models / "llama2").exists():
        shutil.copytree(models / "llama", models / "llama2")
    recipe, words = BAD[name]
    (models / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = sorted(os.listdir(models))
    assert cli.main(["merge", "recipe.yaml", "out"]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert (out, len([line for line in err.splitlines() if "error:" in line])) == ("", 1)
    assert last.startswith("moe-llm: error: ")
    with pytest.raises(UserError, match=words):
        raise UserError(last)
    assert sorted(os.listdir(models)) == before


def test_what_is_there_is_not_overwritten(models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    (models / "recipe.yaml").write_text(yaml.safe_dump(two()))
    before = load_file(models / "b/model.safetensors")
    assert cli.main(["merge", "recipe.yaml", "b"]) == 2
    assert "output 'b' exists already" in capsys.readouterr().err
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(models / "b/model.safetensors").items())
    assert cli.main(["merge", "recipe.yaml", "c", "--max-shard-size", "3"]) == 2
    assert cli.main(["merge", "nothing.yaml", "c"]) == 2
    assert not (models / "c").exists()


def test_what_cannot_be_replaced_is_told_before_any_work(models, monkeypatch, tmp_path, capsys):
    """At the end the output takes over the name, which neither a link nor `.` lets happen."""
    monkeypatch.setattr("moe_llm.merge.run.merge_recipe", lambda *_: pytest.fail("began to work"))
    content = two(models=model_list(str(models / "a"), str(models / "b")))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here/link").symlink_to(tmp_path / "there")
    (tmp_path / "here/dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / "there")
    for out, what in ((".", "the working directory"), ("../here/link", "a link"), ("../here/dangling", "a link")):
        assert cli.main(["merge", "../recipe.yaml", out]) == 2
        assert f"output {out!r} is {what}, which cannot be replaced" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_no_space_is_told_before(models, monkeypatch, tmp_path):
    monkeypatch.chdir(models)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"0\.00 GB are free"):
        merged(two(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_nothing(models, monkeypatch, tmp_path, failure):
    monkeypatch.chdir(models)
    real, calls = write_module.ShardSet.write, []

    def fail(self, name, tensor):
        calls.append(name)
        if len(calls) == 20:
            raise failure
        real(self, name, tensor)

    monkeypatch.setattr(write_module.ShardSet, "write", fail)
    with pytest.raises(UserError if isinstance(failure, OSError) else KeyboardInterrupt):
        merged(two(), tmp_path / "out")
    assert (len(calls), os.listdir(tmp_path)) == (20, [])


def test_the_output_is_a_whole_checkpoint(models, monkeypatch, tmp_path):
    monkeypatch.chdir(models)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    save(make_model(), tmp_path / "a")
    Words().save(tmp_path / "a")
    (tmp_path / "a/generation_config.json").write_text('{"top_k": 3}')
    said = []
    recipe = two(models=model_list(str(tmp_path / "a"), "b"), parameters={"weight": 0.5, "t": 0.3})
    merged(recipe, tmp_path / "out", max_shard_size="2KB", say=said.append)
    assert said == ["linear makes no use of t"]
    files = set(os.listdir(tmp_path / "out"))
    assert {"config.json", "generation_config.json", "tokenizer.json", "merge_recipe.yaml"} <= files
    assert len([name for name in files if name.endswith(".safetensors")]) > 3
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"
    kept = yaml.safe_load((tmp_path / "out/merge_recipe.yaml").read_text())
    assert parse_recipe(kept) == parse_recipe(recipe)


def test_differing_settings_are_said(models, tmp_path):
    save(make_model(seed=3, rope_theta=5e5, num_experts_per_tok=1), tmp_path / "far")
    said = []
    recipe = two(models=model_list(str(models / "a"), str(tmp_path / "far")))
    merged(recipe, tmp_path / "out", say=said.append)
    assert [line.split()[0] for line in said] == ["num_experts_per_tok", "rope_theta"]


def test_settings_resolve_from_the_narrowest_scope():
    number = Parameter(default=7.0)
    scopes = [{"x": [{"filter": "up", "value": 1}]}, {"x": [0, 1, 4]}]
    found = [resolve("x", number, scopes, name, depth, "") for name, depth in (("up", 0), ("o", 0.25), ("o", 1))]
    assert found == [1, 0.5, 4]
    assert resolve("y", number, scopes, "o", 0, "") == 7
    published = [{"x": [{"filter": "block_sparse_moe.gate", "value": 2}]}]
    assert resolve("x", number, published, "model.layers.0.mlp.gate.weight", 0, "") == 2


def test_scalars_are_yamls_own_and_numbers_with_exponents_are_numbers(models, tmp_path):
    text = f"merge_method: linear\nmodels:\n- model: {models / 'a'}\n  parameters:\n    weight: 1e-3\n"
    (tmp_path / "r.yaml").write_text(text)
    assert cli.main(["merge", str(tmp_path / "r.yaml"), str(tmp_path / "out")]) == 0

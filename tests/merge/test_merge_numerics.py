"""Numbers that a merge cannot stand behind are refused or reported, never written in silence."""

import json

import pytest
import torch
from merge_fakes import Words, load, make_model, merged, model_list, save

from moe_llm.errors import UserError
from moe_llm.merge.methods import METHODS


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    root = tmp_path_factory.mktemp("three")
    base = make_model("llama")
    return [save(make_model("llama", i, base), root / f"m{i}") for i in range(3)]


DIVIDED = [name for name, method in METHODS.items() if "normalize" in method.parameters]


@pytest.mark.parametrize("method", DIVIDED)
@pytest.mark.parametrize(
    "weights", [(0.1, 0.2, -0.3), (1.0, -1.0, 0.0), (1e6, 1.0, -1000001.0), (3.0, -2.9999999, -1e-7)]
)
def test_weights_that_cancel_are_not_divided_by(three, tmp_path, method, weights):
    models, base = model_list(*three, weight=list(weights)), make_model("llama")
    recipe = {"merge_method": method, "models": models, "parameters": {"normalize": True, "density": 0.5}}
    if METHODS[method].needs_base:
        recipe["base_model"] = save(base, tmp_path / "base")
    with pytest.raises(UserError, match="weight adds up to"):
        merged(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = merged(recipe | {"parameters": {"normalize": False, "density": 0.5}}, tmp_path / "out")
    assert all(tensor.abs().max() < 1e8 for tensor in found.values())


def test_nuslerp_has_no_share_of_weights_that_cancel(three, tmp_path):
    recipe = {"merge_method": "nuslerp", "models": model_list(*three[:2], weight=[0.3, -0.3])}
    with pytest.raises(UserError, match="weight adds up to"):
        merged(recipe, tmp_path / "out")


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "weight" in method.parameters])
def test_a_model_of_weight_0_is_left_out_whatever_it_holds(three, tmp_path, method):
    broken = make_model("llama", 7)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(float("nan"))
    names = [three[0], save(broken, tmp_path / "nan")]
    recipe = {"merge_method": method, "models": model_list(*names, weight=[1.0, 0.0])}
    if METHODS[method].needs_base:
        recipe["base_model"] = three[1]
    found = merged(recipe, tmp_path / "out")
    assert all(tensor.isfinite().all() for tensor in found.values())
    if method in ("linear", "nuslerp"):
        for name, tensor in load(three[0]).items():
            torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize(
    ("method", "parameters"), [("slerp", {"t": 0.5}), ("nuslerp", {"weight": 0.5}), ("karcher", {})]
)
def test_opposite_models_are_reported(tmp_path, method, parameters):
    model = make_model("llama")
    paths = [save(model, tmp_path / "plus")]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    paths.append(save(model, tmp_path / "minus"))
    recipe = {"merge_method": method, "models": model_list(*paths), "parameters": parameters}
    if method == "slerp":
        recipe["base_model"] = paths[0]
    told = []
    merged(recipe, tmp_path / "out", say=told.append)
    assert len(told) == 1
    assert "more tensors: the models" in told[0]


@pytest.mark.parametrize("where", ["dtype", "out_dtype"])
def test_numbers_beyond_the_dtype_are_refused(three, tmp_path, where):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 7e4
    paths = [save(model, tmp_path / "large"), three[0]]
    recipe = {"merge_method": "linear", "models": model_list(*paths, weight=1.0)}
    merged(recipe | {where: "bfloat16"}, tmp_path / "bf16")
    with pytest.raises(UserError, match=r"lm_head\.weight of the output would hold NaN or infinity.*65504"):
        merged(recipe | {"parameters": {"normalize": False}, where: "float16"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_and_tokens_that_differ_get_a_line(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    paths = [
        save(make_model("llama"), tmp_path / "a"),
        save(make_model("llama", 1, max_position_embeddings=128, rope_parameters=rope), tmp_path / "b"),
    ]
    words = Words()
    words.save(tmp_path / "a")
    Words([*words.words[:3], *reversed(words.words[3:])]).save(tmp_path / "b")
    told = []
    merged({"merge_method": "linear", "models": model_list(*paths, weight=0.5)}, tmp_path / "out", say=told.append)
    assert sum("max_position_embeddings is 128" in line for line in told) == 1
    assert sum("rope scaling is linear (factor=2.0)" in line for line in told) == 1
    assert sum("vocabularies of one size with other tokens" in line for line in told) == 1
    assert len(told) == 3


def test_models_alike_get_no_line(three, tmp_path):
    for path in three[:2]:
        config = json.loads((tmp_path.joinpath(path, "config.json")).read_text())
        config.pop("rope_parameters", None)
        tmp_path.joinpath(path, "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0}))
    told = []
    merged({"merge_method": "linear", "models": model_list(*three, weight=0.5)}, tmp_path / "out", say=told.append)
    assert told == []

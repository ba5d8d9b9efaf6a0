"""Each method against its paper's equation on whole tensors, and its output in transformers."""

import math

import pytest
import torch
from merge_fakes import load, make_model, merged, model_list, save

from moe_llm.merge import job
from moe_llm.merge.methods import METHODS


@pytest.fixture(scope="module", params=["mixtral", "llama", "mistral"])
def family(request, tmp_path_factory):
    """A base and three fine-tunes, each stored in another way; the references and what transformers sees in them."""
    root, kind = tmp_path_factory.mktemp(request.param), request.param
    base = make_model(kind)
    models = [base, *(make_model(kind, seed, base, step=1.0) for seed in (1, 2, 3))]
    layouts = ["published", "stacked", "published", "stacked"]
    paths = [
        save(model, root / f"m{i}", layout, shards=1 + i % 3) for i, (model, layout) in enumerate(zip(models, layouts))
    ]
    return paths, [load(path) for path in paths]


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    """Every tensor takes several spans, and their borders fall into the middle of rows and of experts."""
    monkeypatch.setattr(job, "SPAN", 211)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def each(function, *states):
    return {name: function(*(state[name] for state in states)) for name in states[0]}


def task_recipe(method, paths, base=0, **parameters):
    models = model_list(*paths[1:], **parameters)
    return {"merge_method": method, "base_model": paths[base], "models": models}


def test_linear_is_the_weighted_mean(family, tmp_path):
    paths, states = family
    recipe = {"merge_method": "linear", "models": model_list(*paths, weight=[1, 2, 3, 4])}
    expected = each(lambda *xs: sum(x * (i + 1) for i, x in enumerate(xs)) / 10, *states)
    assert_close(merged(recipe, tmp_path / "a"), expected)
    total = each(lambda x: x * 10, expected)
    found = merged({**recipe, "parameters": {"normalize": False}}, tmp_path / "b")
    assert_close(each(lambda x: x / 10, found), each(lambda x: x / 10, total))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_turns_from_the_base_to_the_other(family, tmp_path, t):
    paths, states = family

    def turned(a, b):
        angle = torch.acos((a * b).double().sum() / a.double().norm() / b.double().norm())
        return ((math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)).float()

    recipe = {"merge_method": "slerp", "base_model": paths[0], "models": model_list(paths[1], paths[0]),
              "parameters": {"t": t}}  # fmt: skip
    found = merged(recipe, tmp_path / "a")
    assert_close(found, each(turned, *states[:2]))


def test_slerp_of_vectors_in_line_is_linear(family, tmp_path):
    paths, states = family
    merged({"merge_method": "passthrough", "models": model_list(paths[0], scale=2.0)}, tmp_path / "double")
    recipe = {"merge_method": "slerp", "base_model": paths[0],
              "models": model_list(paths[0], str(tmp_path / "double")), "parameters": {"t": 0.25}}  # fmt: skip
    assert_close(merged(recipe, tmp_path / "a"), each(lambda x: 1.25 * x, states[0]))


def test_task_vectors_are_added_and_negated(family, tmp_path):
    paths, states = family
    recipe = task_recipe("task_arithmetic", paths, weight=[0.5, -0.25, 1.0])
    recipe["parameters"] = {"lambda": 0.5}
    expected = each(lambda b, x, y, z: b + 0.5 * (0.5 * (x - b) - 0.25 * (y - b) + (z - b)), *states)
    assert_close(merged(recipe, tmp_path / "a"), expected)


def trimmed(delta, density):
    kept = max(1, int(density * delta.numel()))
    order = delta.abs().flatten().sort(descending=True, stable=True).indices[:kept]
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[order] = True
    return torch.where(mask.view_as(delta), delta, 0.0)


def elected(base, deltas, weights):
    deltas = [delta * weight for delta, weight in zip(deltas, weights)]
    sign = torch.where(sum(deltas) >= 0, 1.0, -1.0)
    agree = [delta.sign() == sign for delta in deltas]
    divisor = sum(mask * weight for mask, weight in zip(agree, weights))
    return base + sum(delta * mask for delta, mask in zip(deltas, agree)) / torch.where(divisor == 0, 1.0, divisor)


@pytest.mark.parametrize("density", [[0.2, 0.5, 0.9], [1.0, 0.001, 0.0]])
def test_ties_trims_elects_and_averages(family, tmp_path, density):
    paths, states = family
    weights = [0.5, 0.3, 1.0]

    def reference(base, *others):
        thin = [trimmed(x - base, d) if d else torch.zeros_like(x) for x, d in zip(others, density)]
        return elected(base, thin, weights)

    recipe = task_recipe("ties", paths, weight=weights, density=density)
    assert_close(merged(recipe, tmp_path / "a"), each(reference, *states))


def test_ties_keeps_the_first_of_equal_elements(tmp_path):
    """Deltas of bf16 weights take few values, so the border of the trim often falls among equal ones."""
    base = make_model("llama")
    other = make_model("llama", 1, base)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(base.state_dict()[name] + torch.randint(-2, 3, parameter.shape) * 0.25)
            base.state_dict()[name].round_(decimals=2)
    paths = [save(base, tmp_path / "b", dtype=torch.bfloat16), save(other, tmp_path / "o", dtype=torch.bfloat16)]
    states = [each(torch.Tensor.float, load(path)) for path in paths]
    recipe = task_recipe("ties", paths, weight=[1.0], density=[0.3]) | {"out_dtype": "float32"}
    expected = each(lambda b, x: b + trimmed(x - b, 0.3), *states)
    assert_close(merged(recipe, tmp_path / "out"), expected)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_at_random_and_rescales(tmp_path, method):
    base = make_model("llama", intermediate_size=500, num_hidden_layers=1)
    other = make_model("llama", 1, base, step=1.0, intermediate_size=500, num_hidden_layers=1)
    paths = [save(base, tmp_path / "b"), save(other, tmp_path / "o")]
    b, x = (load(path) for path in paths)
    recipe = task_recipe(method, paths, weight=[1.0], density=[0.3])
    found = merged(recipe, tmp_path / "a")
    name = "model.layers.0.mlp.up_proj.weight"
    moved = found[name] != b[name]
    assert moved.float().mean().item() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(found[name][moved], (b[name] + (x[name] - b[name]) / 0.3)[moved], rtol=1e-6, atol=1e-5)
    again, other_seed = merged(recipe, tmp_path / "c"), merged(recipe | {"seed": 1}, tmp_path / "d")
    assert all(torch.equal(found[n], again[n]) for n in found)
    assert not torch.equal(other_seed[name], found[name])
    plain = merged(recipe | {"parameters": {"rescale": False}}, tmp_path / "e")
    torch.testing.assert_close(plain[name][moved], x[name][moved], rtol=1e-6, atol=1e-5)
    whole = merged(task_recipe(method, paths, weight=[1.0], density=[1.0]), tmp_path / "f")
    assert_close(whole, x)


def test_dare_drops_of_several_models_are_independent(tmp_path):
    base = make_model("llama")
    other = make_model("llama", 1, base, step=1.0)
    paths = [save(base, tmp_path / "b"), save(other, tmp_path / "o"), save(other, tmp_path / "p")]
    b, x, _ = (load(path) for path in paths)
    found = merged(task_recipe("dare_linear", paths, weight=[1.0, 1.0], density=[0.5, 0.5]), tmp_path / "a")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        times = ((found[name] - b[name]) / (x[name] - b[name])).round()
        assert set(times.flatten().tolist()) == {0.0, 2.0, 4.0}


def test_layers_are_stacked(family, tmp_path):
    paths, states = family
    ranges = [(0, [0, 2]), (1, [1, 3]), (2, [0, 1])]
    slices = [{"sources": [{"model": paths[i], "layer_range": layers}]} for i, layers in ranges]
    slices[1]["sources"][0]["parameters"] = {"scale": [{"filter": "o_proj", "value": 0.0}, {"value": 1.0}]}
    found = merged({"merge_method": "passthrough", "slices": slices}, tmp_path / "a")
    origin = [(0, 0), (0, 1), (1, 1), (1, 2), (2, 0)]
    for layer, (model, source) in enumerate(origin):
        for name in (n for n in states[0] if n.startswith("model.layers.0.")):
            expected = states[model][name.replace(".0.", f".{source}.", 1)]
            scale = 0.0 if model == 1 and "o_proj" in name else 1.0
            assert torch.equal(found[name.replace(".0.", f".{layer}.", 1)], expected * scale), name
    assert torch.equal(found["model.embed_tokens.weight"], states[0]["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], states[2]["lm_head.weight"])


def test_gradients_and_filters(family, tmp_path):
    paths, states = family
    weight = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.25}, {"value": 0.75}]
    recipe = task_recipe("task_arithmetic", paths[:2], weight=1.0)
    recipe["models"][0]["parameters"]["weight"] = weight
    found = merged(recipe, tmp_path / "a")

    def share(name):
        if "self_attn" in name:
            return int(name.split(".")[2]) / 2
        return 0.25 if "mlp" in name else 0.75

    base, other = states[:2]
    assert_close(found, {name: base[name] + share(name) * (other[name] - base[name]) for name in base})


@pytest.mark.parametrize("method", METHODS)
def test_dtypes(method, tmp_path):
    base = make_model()
    paths = [save(base, tmp_path / "b"), save(make_model(seed=1, base=base), tmp_path / "o", dtype=torch.bfloat16)]
    parameters = {"linear": {"weight": 1.0}, "slerp": {"t": 0.5}}.get(method, {"weight": 0.5})
    parameters = {name: value for name, value in parameters.items() if name in METHODS[method].parameters}
    if METHODS[method].least > len(paths):
        paths.append(save(make_model(seed=2, base=base), tmp_path / "p"))
    names = paths[1:] if method == "passthrough" else paths
    recipe = {"merge_method": method, "models": model_list(*names), "parameters": parameters}
    if METHODS[method].needs_base:
        recipe["base_model"] = paths[0]
    wanted = torch.bfloat16 if method == "passthrough" else torch.float32  # what holds all inputs
    for changes, dtype in (({}, wanted), ({"dtype": "bfloat16"}, torch.bfloat16),
                           ({"dtype": "bfloat16", "out_dtype": "float16"}, torch.float16)):  # fmt: skip
        found = merged(recipe | changes, tmp_path / f"out{len(changes)}")
        assert {tensor.dtype for tensor in found.values()} == {dtype}


def test_tied_and_untied_heads(tmp_path):
    tied, untied = make_model("llama", tie_word_embeddings=True), make_model("llama", 1)
    paths = [save(tied, tmp_path / "t"), save(untied, tmp_path / "u")]
    a, b = (load(path) for path in paths)
    half = {"merge_method": "linear", "models": model_list(*paths, weight=0.5)}
    found = merged(half, tmp_path / "out")
    assert_close(found, each(lambda x, y: (x + y) / 2, a, b))
    both = merged({"merge_method": "linear", "models": model_list(paths[0], weight=1)}, tmp_path / "still")
    assert both["lm_head.weight"].data_ptr() == both["model.embed_tokens.weight"].data_ptr()

"""Breadcrumbs, DELLA, SCE, model stock, Karcher mean and NuSLERP, each against its paper's equations on whole tensors."""

import pytest
import torch
from merge_fakes import load, make_model, merged, model_list, save
from test_methods import assert_close, each, elected, short_spans, task_recipe  # noqa: F401

from moe_llm.errors import UserError


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root, base = tmp_path_factory.mktemp("family"), make_model("mixtral", num_hidden_layers=2)
    models = [base, *(make_model("mixtral", seed, base, step=1.0, num_hidden_layers=2) for seed in (1, 2, 3))]
    paths = [save(model, root / f"m{i}", ("published", "stacked")[i % 2]) for i, model in enumerate(models)]
    return paths, [load(path) for path in paths]


def banded(delta, density, gamma):
    """Neither the largest nor the smallest: of n magnitudes in rising order, density * n below the gamma * n last."""
    n = delta.numel()
    wanted = int(density * n)
    first = max(0, n - wanted - int(gamma * n))
    order = delta.abs().flatten().sort(stable=True).indices[first : first + wanted]
    mask = torch.zeros(n, dtype=torch.bool)
    mask[order] = True
    return torch.where(mask.view_as(delta), delta, 0.0)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_leave_out_outliers_and_small_elements(family, tmp_path, method):
    paths, states = family
    weights, density, gamma = [0.5, 0.3, 1.0], [0.3, 0.6, 0.95], [0.1, 0.3, 0.2]
    recipe = task_recipe(method, paths, weight=weights, density=density, gamma=gamma)

    def reference(base, *others):
        thin = [banded(x - base, d, g) for x, d, g in zip(others, density, gamma)]
        if method == "breadcrumbs_ties":
            return elected(base, thin, weights)
        return base + sum(delta * weight for delta, weight in zip(thin, weights))

    recipe["parameters"] = {"normalize": method == "breadcrumbs_ties"}
    assert_close(merged(recipe, tmp_path / "a"), each(reference, *states))


def test_breadcrumbs_rescale_to_the_norm_before(family, tmp_path):
    paths, states = family
    recipe = task_recipe("breadcrumbs", paths[:2], weight=[1.0], density=[0.3], gamma=[0.1])
    recipe["parameters"] = {"rescale": True}

    def reference(base, other):
        kept = banded(other - base, 0.3, 0.1)
        norm = kept.abs().sum()
        return base + kept * ((other - base).abs().sum() / norm if norm > 0 else 1.0)

    assert_close(merged(recipe, tmp_path / "a"), each(reference, *states[:2]))


def test_della_keeps_large_elements_of_a_row_more_often(tmp_path):
    base = make_model("llama", intermediate_size=500, num_hidden_layers=1)
    other = make_model("llama", 1, base, step=1.0, intermediate_size=500, num_hidden_layers=1)
    paths, name = [save(base, tmp_path / "b"), save(other, tmp_path / "o")], "model.layers.0.mlp.down_proj.weight"
    recipe = task_recipe("della_linear", paths, weight=[1.0], density=[0.4], epsilon=[0.3])
    delta = other.state_dict()[name] - base.state_dict()[name]
    rank = delta.abs().argsort(1).argsort(1) / (delta.shape[1] - 1)
    found = merged(recipe | {"parameters": {"rescale": False}}, tmp_path / "a")
    moved = found[name] != base.state_dict()[name]
    torch.testing.assert_close((found[name] - base.state_dict()[name])[moved], delta[moved], rtol=1e-5, atol=1e-5)
    for low in (0.0, 0.25, 0.5, 0.75):  # 0.1 + 0.6 * rank
        inside = (rank >= low) & (rank < low + 0.25)
        assert moved[inside].float().mean().item() == pytest.approx(0.1 + 0.6 * (low + 0.125), abs=0.06)
    again = merged(recipe | {"parameters": {"rescale": True}}, tmp_path / "c")
    assert (again[name] - base.state_dict()[name]).abs().sum().item() == pytest.approx(
        delta.abs().sum().item(), rel=1e-4
    )
    assert torch.equal(again[name] != base.state_dict()[name], moved)  # and the draws are those of the seed
    elected_one = merged(task_recipe("della", paths, weight=[0.5], density=[1.0]), tmp_path / "d")
    assert_close(elected_one, load(paths[1]))  # of one model, normalised, nothing dropped


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.2)])
def test_della_refuses_probabilities_that_are_none(family, tmp_path, density, epsilon):
    recipe = task_recipe("della", family[0], weight=[1.0] * 3, density=[density] * 3, epsilon=[epsilon] * 3)
    with pytest.raises(UserError, match=f"epsilon={epsilon:g} with density={density:g}.*lower epsilon below 0.1"):
        merged(recipe, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
def test_sce_selects_weighs_and_erases(family, tmp_path, share):
    paths, states = family
    recipe = task_recipe("sce", paths) | {"parameters": {"select_topk": share}}

    def reference(base, *others):
        deltas = torch.stack([x - base for x in others])
        if share < 1:
            variance = deltas.var(0, correction=0).flatten()
            count = int((variance > 0).sum() * share)
            mask = torch.zeros_like(variance)
            mask[variance.sort(descending=True, stable=True).indices[:count]] = 1
            deltas = deltas * mask.view_as(base)
        weights = torch.stack([(delta**2).mean() for delta in deltas])
        weights = weights / weights.sum() if weights.sum() > 1e-6 else torch.full_like(weights, 1 / 3)
        sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
        agree = torch.stack([(delta.sign() == sign) * weight for delta, weight in zip(deltas, weights)])
        return base + (deltas * agree).sum(0) / agree.sum(0).clamp(min=1e-6)

    assert_close(merged(recipe, tmp_path / "a"), each(reference, *states))


@pytest.mark.parametrize("rows", [False, True])
def test_model_stock_goes_as_far_as_the_fine_tunes_agree(family, tmp_path, rows):
    paths, states = family
    recipe = task_recipe("model_stock", paths) | {"parameters": {"filter_wise": rows}}

    def reference(base, *others):
        flat = [(x - base).double().view(-1, base.shape[-1] if rows else base.numel()) for x in others]
        pairs = [(0, 1), (0, 2), (1, 2)]
        cosine = sum(torch.cosine_similarity(flat[a], flat[b], dim=1) for a, b in pairs) / 3
        t = (3 * cosine / (1 + 2 * cosine))[:, None]
        mean = (sum(flat) / 3 * t).view_as(base)
        return (base + mean).float()

    assert_close(merged(recipe, tmp_path / "a"), each(reference, *states))


def test_the_karcher_mean_has_no_tangent_left(family, tmp_path):
    """Its defining property: the mean of the logarithms of all models, seen from it, is zero; its length is the mean."""
    paths, states = family
    recipe = {"merge_method": "karcher", "models": model_list(*paths), "parameters": {"max_iter": 200, "tol": 1e-9}}
    found = merged(recipe, tmp_path / "a")
    for name, tensor in found.items():
        inputs = [state[name].double().flatten() for state in states]
        mean, lengths = tensor.double().flatten(), [x.norm() for x in inputs]
        assert mean.norm().item() == pytest.approx((sum(lengths) / 4).item(), rel=1e-5)
        unit, pulls = mean / mean.norm(), []
        for x, length in zip(inputs, lengths):
            cosine = (x @ unit / length).clamp(-1, 1)
            angle = cosine.acos()
            pulls.append(angle / angle.sin() * (x / length - cosine * unit))
        assert sum(pulls).norm().item() < 1e-5


def test_the_karcher_mean_of_two_lies_half_way(family, tmp_path):
    paths, states = family
    recipe = {"merge_method": "karcher", "models": model_list(*paths[:2])}

    def half(a, b):
        unit = a / a.norm() + b / b.norm()
        return unit / unit.norm() * (a.norm() + b.norm()) / 2

    assert_close(merged(recipe, tmp_path / "a"), each(half, *states[:2]))


def turned(a, b, t, dim):
    """Shoemake 1985 along one dimension of doubles."""
    cosine = (a * b).sum(dim, keepdim=True) / a.norm(dim=dim, keepdim=True) / b.norm(dim=dim, keepdim=True)
    angle = cosine.clamp(-1, 1).acos()
    found = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return torch.where(1 - cosine**2 < 1e-16, (1 - t) * a + t * b, found)


def test_the_karcher_mean_with_no_tolerance_is_that_with_a_little(family, tmp_path):
    paths, _ = family

    def mean(tol: float, out: str) -> dict[str, torch.Tensor]:
        parameters = {"max_iter": 200, "tol": tol}
        recipe = {"merge_method": "karcher", "models": model_list(*paths), "parameters": parameters}
        return merged(recipe, tmp_path / out)

    assert_close(mean(0.0, "a"), mean(1e-9, "b"))


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("how", ["whole", "rows", "first"])
def test_nuslerp_turns_by_the_share_of_the_weights(family, tmp_path, how, with_base):
    paths, states = family
    switches = {"whole": {}, "rows": {"nuslerp_flatten": False},
                "first": {"nuslerp_flatten": False, "nuslerp_row_wise": True}}[how]  # fmt: skip
    recipe = {"merge_method": "nuslerp", "models": model_list(*paths[1:3], weight=[0.6, 0.2]), "parameters": switches}
    if with_base:
        recipe["base_model"] = paths[0]

    def reference(base, a, b):
        a, b = (x.double() - base.double() * with_base for x in (a, b))
        flat = how == "whole" or (how == "first" and base.dim() == 1)
        shaped = [x.flatten() for x in (a, b)] if flat else [a, b]
        moved = turned(*shaped, 0.25, 0 if how == "first" and not flat else -1).view_as(base)
        return (base * with_base + moved).float()

    assert_close(merged(recipe, tmp_path / "a"), each(reference, *states[:3]))


def test_recipes_that_do_not_fit_the_method_are_refused(family, tmp_path):
    paths, _ = family
    both = {"merge_method": "nuslerp", "models": model_list(*paths[1:3], weight=0.5)}
    cases = [
        (both | {"parameters": {"nuslerp_row_wise": True}}, "nuslerp_row_wise=true does nothing"),
        (both | {"models": model_list(*paths, weight=0.5)}, "takes 2 to 3 models, and 4 are given"),
        (both | {"models": model_list(*paths[:2], weight=0.5), "base_model": paths[0]}, "1 are not the base: give two"),
        (both | {"models": model_list(*paths[1:3], weight=[1, -1])}, "weight adds up to 0 .*: change the weights$"),
        (task_recipe("model_stock", paths[:2]), "takes at least 3 models, and 2 are given"),
        ({"merge_method": "sce", "models": model_list(*paths)}, "base_model is missing, and sce needs it"),
        (task_recipe("breadcrumbs", paths, weight=[1] * 3, gamma=[2.0] * 3), "gamma=2.0 .* out of range"),
        ({"merge_method": "karcher", "models": model_list(*paths), "parameters": {"max_iter": 0}}, "max_iter=0"),
    ]
    for recipe, message in cases:
        with pytest.raises(UserError, match=message):
            merged(recipe, tmp_path / "a")

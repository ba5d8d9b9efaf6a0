"""Merging does not depend on the order of experts, nor, if asked for, on that of the neurons within them."""

import json

import pytest
import torch
from merge_fakes import load, make_model, merged, model_list, save
from transformers import MixtralForCausalLM

from moe_llm.errors import UserError
from moe_llm.merge import job
from moe_llm.merge.align import best_order


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    monkeypatch.setattr(job, "SPAN", 101)


def permuted(model, seed=5, neurons=False):
    """A copy that computes the same, with the experts of each layer, and their neurons, in another order."""
    copy = MixtralForCausalLM(model.config).eval()
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in copy.model.layers:
            experts, E = layer.mlp.experts, model.config.num_local_experts
            order = torch.randperm(E, generator=generator)
            layer.mlp.gate.weight.copy_(layer.mlp.gate.weight[order])
            experts.gate_up_proj.copy_(experts.gate_up_proj[order])
            experts.down_proj.copy_(experts.down_proj[order])
            for e in range(E) if neurons else ():
                F = model.config.intermediate_size
                k = torch.randperm(F, generator=generator)
                experts.gate_up_proj[e] = experts.gate_up_proj[e][torch.cat([k, F + k])]
                experts.down_proj[e] = experts.down_proj[e][:, k]
    return copy


def recipe(paths, align, method="linear", **changes):
    models = model_list(*paths, weight=0.5)
    return {"merge_method": method, "models": models, "align_experts": align} | changes


@pytest.mark.parametrize("layout", ["published", "stacked"])
@pytest.mark.parametrize("neurons", [False, True])
@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_a_permuted_copy_gives_the_model_back_exactly(tmp_path, layout, neurons, method):
    model = make_model()
    copy = permuted(model, neurons=neurons)
    ids = torch.randint(0, 24, (2, 9))
    torch.testing.assert_close(copy(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    paths = [save(model, tmp_path / "a"), save(copy, tmp_path / "b", layout)]
    changes = {"parameters": {"t": 0.5}} if method == "slerp" else {}
    changes |= {} if method == "linear" else {"base_model": paths[0]}
    said = []
    found = merged(recipe(paths, "weights", method, align_neurons=neurons, **changes), tmp_path / "m", say=said.append)
    assert "experts moved, in 3 of 3 layers" in said[-1]
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name
    blind = merged(recipe(paths, "none", method, **changes), tmp_path / "n")
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(blind[gate], model.state_dict()[gate])


def test_the_matching_is_written_beside_the_model_and_undoes_the_permutation(tmp_path):
    model = make_model()
    copy = permuted(model)
    paths = [save(model, tmp_path / "a"), save(copy, tmp_path / "b")]
    merged(recipe(paths, "weights"), tmp_path / "m")
    rows = json.loads((tmp_path / "m/expert_matching.json").read_text())["matches"]
    assert [row["layer"] for row in rows] == [0, 1, 2]
    for row in rows:
        theirs = copy.model.layers[row["other_layer"]].mlp.gate.weight
        assert torch.equal(theirs[row["matched_with"]], model.model.layers[row["layer"]].mlp.gate.weight)
        assert [max(range(len(line)), key=line.__getitem__) for line in row["similarity"]] == row["matched_with"]
    assert (tmp_path / "m/expert_matching.png").read_bytes().startswith(b"\x89PNG")
    merged(recipe(paths, "none"), tmp_path / "n")
    assert not list((tmp_path / "n").glob("expert_matching*"))


def test_without_alignment_the_loss_is_worse(tmp_path):
    model = make_model(initializer_range=0.2)
    torch.manual_seed(0)
    ids = torch.randint(0, 24, (4, 32))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    with torch.enable_grad():
        for _ in range(30):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    paths = [save(model, tmp_path / "a"), save(permuted(model), tmp_path / "b")]
    losses = {}
    for align in ("none", "weights"):
        merged(recipe(paths, align), tmp_path / align)
        with torch.no_grad():
            out = MixtralForCausalLM.from_pretrained(tmp_path / align, experts_implementation="eager")
            losses[align] = out(ids, labels=ids).loss.item()
    assert losses["weights"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    assert losses["none"] > losses["weights"] + 0.3


def test_permuted_fine_tunes_are_matched_too(tmp_path):
    base = make_model()
    tune = make_model(seed=1, base=base, step=0.2)
    paths = [save(m, tmp_path / n) for n, m in (("b", base), ("t", tune), ("p", permuted(tune, neurons=True)))]
    straight = merged(recipe(paths[:2], "none"), tmp_path / "s")
    found = merged(recipe([paths[0], paths[2]], "weights", align_neurons=True), tmp_path / "f")
    for name, tensor in straight.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


def test_fine_tunes_of_one_base_stay_as_they_are(tmp_path):
    """Also of a base whose experts are one and the same, as upcycled ones are: noise must not reorder them."""
    base = make_model()
    alike = make_model()
    with torch.no_grad():
        for layer in alike.model.layers:
            for parameter in layer.mlp.experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
    for i, root in enumerate((base, alike)):
        paths = [save(make_model(seed=s, base=root, step=0.01), tmp_path / f"{i}{s}") for s in (1, 2)]
        said = []
        found = merged(recipe(paths, "weights"), tmp_path / f"a{i}", say=said.append)
        assert "already in order in all 3 layers" in said[-1]
        plain = merged(recipe(paths, "none"), tmp_path / f"n{i}")
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_slices_align_the_layers_that_meet(tmp_path):
    model = make_model()
    paths = [save(model, tmp_path / "a"), save(permuted(model), tmp_path / "b")]
    sources = [{"model": path, "layer_range": [1, 3]} for path in paths]
    found = merged(
        {"merge_method": "linear", "slices": [{"sources": sources}], "parameters": {"weight": 1.0},
         "align_experts": "weights"}, tmp_path / "m")  # fmt: skip
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        assert torch.equal(found[f"model.layers.0.mlp.{name}"], model.state_dict()[f"model.layers.1.mlp.{name}"])


def test_activations_match_experts_too(tmp_path, words):
    model = make_model(vocab_size=words.size)
    paths = [save(model, tmp_path / "a"), save(permuted(model, neurons=True), tmp_path / "b")]
    for path in paths:
        words.save(path)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran " * 20)
    asked = {"align_text": [str(text)], "align_tokens": 64, "align_neurons": True}
    found = merged(recipe(paths, "activations", **asked), tmp_path / "m")
    for name, tensor in load(paths[0]).items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("neurons", [False, True])
def test_experts_without_numbers_are_refused(tmp_path, neurons):
    model, broken = make_model(), make_model(seed=1)
    broken.state_dict()["model.layers.1.mlp.experts.down_proj"][2] = torch.nan
    paths = [save(model, tmp_path / "a"), save(broken, tmp_path / "b")]
    with pytest.raises(UserError, match=r"layer 1 of .*a and layer 1 of .*b cannot be compared|holds NaN or infinity"):
        merged(recipe(paths, "weights", align_neurons=neurons), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_the_order_as_it_is_wins_within_the_margin():
    similarity = torch.tensor([[0.5, 0.5005], [0.5005, 0.5]])
    assert best_order(similarity, 0.001).tolist() == [0, 1]
    assert best_order(similarity, 0.0001).tolist() == [1, 0]

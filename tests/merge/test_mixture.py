"""Dense models to a mixture: experts, gates, and what it computes."""

import pytest
import torch
from merge_fakes import Words, load, make_model, merged, save
from transformers import AutoModelForCausalLM

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.errors import UserError


@pytest.fixture(scope="module", params=["llama", "mistral"])
def dense(request, tmp_path_factory):
    root, words, paths = tmp_path_factory.mktemp(request.param), Words(), []
    base = make_model(request.param, vocab_size=words.size)
    for i, model in enumerate([base, *(make_model(request.param, s, base, vocab_size=words.size) for s in (1, 2))]):
        paths.append(save(model, root / f"m{i}", shards=i + 1))
        words.save(paths[-1])
    return paths


def recipe(paths, gate_mode="cheap_embed", **changes):
    experts = [
        {"source_model": paths[1], "positive_prompts": ["the cat sat"], "negative_prompts": ["dog"]},
        {"source_model": paths[2], "positive_prompts": ["and the dog ran", "on the mat"]},
    ]
    return {"base_model": paths[0], "gate_mode": gate_mode, "experts": experts} | changes


def test_experts_are_the_feed_forward_layers(dense, tmp_path):
    states = [load(path) for path in dense]
    found = merged(recipe(dense), tmp_path / "out")
    for i in range(3):
        for e in range(2):
            source = {n: states[e + 1][f"model.layers.{i}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")}
            gate_up = found[f"model.layers.{i}.mlp.experts.gate_up_proj"][e]
            assert torch.equal(gate_up, torch.cat([source["gate"], source["up"]]))
            assert torch.equal(found[f"model.layers.{i}.mlp.experts.down_proj"][e], source["down"])
    rest = [name for name in states[0] if ".mlp." not in name]
    assert all(torch.equal(found[name], states[0][name]) for name in rest)
    words = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "mat", "and", "dog", "ran"]
    embedding = states[0]["model.embed_tokens.weight"]

    def direction(text):
        return torch.nn.functional.normalize(sum(embedding[words.index(word)] for word in text.split()), dim=0)

    rows = [direction("<s> the cat sat") - direction("<s> dog"), direction("<s> and the dog ran <s> on the mat")]
    for i in range(3):
        gate = found[f"model.layers.{i}.mlp.gate.weight"]
        torch.testing.assert_close(gate, torch.stack([torch.nn.functional.normalize(row, dim=0) for row in rows]))


def test_equal_experts_compute_what_the_dense_model_does(dense, tmp_path):
    experts = [{"source_model": dense[0]}, {"source_model": dense[0]}]
    merged({"base_model": dense[0], "gate_mode": "random", "experts": experts}, tmp_path / "out")
    ids = torch.randint(0, 11, (2, 7))
    models = [
        AutoModelForCausalLM.from_pretrained(path, experts_implementation=kind)
        for path, kind in ((dense[0], None), (tmp_path / "out", "eager"))
    ]
    with torch.no_grad():
        logits = [model(ids).logits for model in models] + [
            MoEForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-4, atol=1e-4)


def test_hidden_gates_are_hidden_states_of_the_base(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense[0])
    with torch.no_grad():
        states = model(torch.tensor([[1, 8, 3, 9, 10]]), output_hidden_states=True).hidden_states
    experts = [{"source_model": dense[i], "positive_prompts": [text]}
               for i, text in ((1, "and the dog ran"), (2, "the cat"))]  # fmt: skip
    for mode, pick in (("hidden", lambda x: x[0, -1]), ("hidden_avg", lambda x: x[0].mean(0))):
        found = merged(recipe(dense, mode, experts=experts), tmp_path / mode)
        for i in range(3):
            expected = torch.nn.functional.normalize(pick(states[i]), dim=0)
            torch.testing.assert_close(found[f"model.layers.{i}.mlp.gate.weight"][0], expected)


def test_noise_scale_and_seed(dense, tmp_path):
    experts = [{"source_model": dense[1], "noise_scale": 0.5}, {"source_model": dense[1], "residual_scale": 0.5}]
    raw = {"base_model": dense[0], "gate_mode": "uniform_random", "experts": experts, "seed": 3}
    a, b, c = (merged(raw | changes, tmp_path / name)
               for name, changes in (("a", {}), ("b", {}), ("c", {"seed": 4})))  # fmt: skip
    assert all(torch.equal(a[name], b[name]) for name in a)
    name, source = "model.layers.0.mlp.experts.down_proj", load(dense[1])["model.layers.0.mlp.down_proj.weight"]
    assert not torch.equal(a[name][0], c[name][0])
    assert (a[name][0] - source).std().item() == pytest.approx(0.5, rel=0.4)
    assert torch.equal(a[name][1], source * 0.5)
    gate = a["model.layers.0.mlp.gate.weight"]
    assert gate.abs().max() <= 8**-0.5
    assert not torch.equal(gate, c["model.layers.0.mlp.gate.weight"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gate_mode": "guess"}, "gate_mode='guess' is refused"),
        ({"experts_per_token": 3}, "experts_per_token=3 is above the 2 experts"),
        ({"architecture": "qwen"}, "architecture='qwen' is refused"),
        ({"shared_experts": []}, "unknown key shared_experts"),
        ({"experts": []}, "experts"),
    ],
)
def test_mistakes_are_told(dense, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        merged(recipe(dense) | changes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_that_cannot_be_are_refused(dense, tmp_path):
    same = [{"source_model": path, "positive_prompts": ["cat"]} for path in dense[1:]]
    with pytest.raises(UserError, match="makes all router rows equal"):
        merged(recipe(dense, experts=same), tmp_path / "out")
    with pytest.raises(UserError, match=r"experts.0.positive_prompts=None is needed"):
        merged(recipe(dense, experts=[{"source_model": dense[1]}] * 2), tmp_path / "out")
    save(make_model(), tmp_path / "mixture")
    save(make_model("llama", attention_bias=True), tmp_path / "biased")
    for name, words in (("mixture", "is a mixture already"), ("biased", "and a Mixtral has no biases")):
        path = str(tmp_path / name)
        raw = {"base_model": path, "experts": [{"source_model": path}] * 2, "gate_mode": "random"}
        with pytest.raises(UserError, match=words):
            merged(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()

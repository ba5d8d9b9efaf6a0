"""The same recipe file through mergekit and here, tensor by tensor. Skipped without mergekit."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from merge_fakes import WORDS, Words, load, make_model, merged, save
from transformers import AutoModelForCausalLM

pytest.importorskip("mergekit.merge")

RECIPES = {
    "linear": """
        merge_method: linear
        models:
          - {model: A, parameters: {weight: 0.3}}
          - {model: B, parameters: {weight: [0.1, 0.9]}}""",
    "slerp": """
        merge_method: slerp
        base_model: BASE
        models: [{model: A}, {model: BASE}]
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7]}
            - value: 0.5""",
    "task_arithmetic": """
        merge_method: task_arithmetic
        base_model: BASE
        models:
          - {model: A, parameters: {weight: 0.3}}
          - {model: B, parameters: {weight: -0.5}}""",
    "ties": """
        merge_method: ties
        base_model: BASE
        models:
          - {model: A, parameters: {weight: 0.3, density: 0.4}}
          - {model: B, parameters: {weight: 0.5, density: [1, 0.2]}}
          - {model: C, parameters: {weight: -0.2, density: 0.01}}
        parameters: {lambda: 1.3, int8_mask: true}""",
    "ties, rescaled": """
        merge_method: ties
        base_model: BASE
        models:
          - {model: A, parameters: {weight: 0.3, density: 0.4}}
          - {model: B, parameters: {weight: 0.5, density: 0.5}}
        parameters: {rescale: true, normalize: false}""",
    "breadcrumbs": """
        merge_method: breadcrumbs
        base_model: BASE
        models:
          - {model: A, parameters: {weight: 0.3, density: 0.4, gamma: 0.1}}
          - {model: B, parameters: {weight: -0.5, density: [1, 0.2], gamma: 0.05}}
          - {model: C, parameters: {weight: 0.5, density: 0.97, gamma: 0.2}}""",
    "breadcrumbs_ties": """
        merge_method: breadcrumbs_ties
        base_model: BASE
        models:
          - {model: A, parameters: {weight: 0.3, density: 0.4}}
          - {model: B, parameters: {weight: 0.5, density: 0.9, gamma: 0.3}}
        parameters: {rescale: true, normalize: true, lambda: 0.7}""",
    "della of all": """
        merge_method: della
        base_model: BASE
        models:
          - {model: A, parameters: {weight: 0.3, density: 1.0}}
          - {model: B, parameters: {weight: 0.5}}
          - {model: C, parameters: {weight: 0.5, density: 0.0}}""",
    "sce": """
        merge_method: sce
        base_model: BASE
        models: [{model: A}, {model: B}, {model: C}]
        parameters: {select_topk: 0.3, int8_mask: true}""",
    "sce of all": """
        merge_method: sce
        base_model: BASE
        models: [{model: A}, {model: B}]""",
    "model_stock": """
        merge_method: model_stock
        base_model: BASE
        models: [{model: A}, {model: B}, {model: C}]""",
    "model_stock by row": """
        merge_method: model_stock
        base_model: BASE
        models: [{model: A}, {model: B}]
        parameters: {filter_wise: true}""",
    "karcher": """
        merge_method: karcher
        models: [{model: A}, {model: B}, {model: C}]""",
    "karcher, one step": """
        merge_method: karcher
        models: [{model: A}, {model: BASE}]
        parameters: {max_iter: 1, tol: 0.001}""",
    "nuslerp": """
        merge_method: nuslerp
        models:
          - {model: A, parameters: {weight: 0.3}}
          - {model: B, parameters: {weight: 0.5}}""",
    "nuslerp of task vectors": """
        merge_method: nuslerp
        base_model: BASE
        models:
          - {model: A, parameters: {weight: [0.1, 0.9]}}
          - {model: B, parameters: {weight: 0.5}}""",
    "nuslerp by row": """
        merge_method: nuslerp
        base_model: BASE
        models:
          - {model: A, parameters: {weight: 0.3}}
          - {model: B, parameters: {weight: 0.5}}
        parameters: {nuslerp_flatten: false}""",
    "nuslerp by column": """
        merge_method: nuslerp
        models:
          - {model: A, parameters: {weight: 0.3}}
          - {model: B, parameters: {weight: 0.5}}
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}""",
    "dare of all": """
        merge_method: dare_ties
        base_model: BASE
        models:
          - {model: A, parameters: {weight: 0.3, density: 1.0}}
          - {model: B, parameters: {weight: 0.5}}
        parameters: {normalize: true}""",
    "passthrough": """
        merge_method: passthrough
        slices:
          - sources: [{model: BASE, layer_range: [0, 2]}]
          - sources:
              - model: A
                layer_range: [1, 3]
                parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]}""",
    "slices": """
        merge_method: linear
        parameters: {normalize: false}
        slices:
          - sources:
              - {model: C, layer_range: [0, 2], parameters: {weight: 0.4}}
              - model: B
                layer_range: [1, 3]
                parameters: {weight: [{filter: q_proj, value: 0.1}, {value: 0.6}]}
          - sources: [{model: A, layer_range: [1, 3], parameters: {weight: 1}}]""",
}


@pytest.fixture(scope="module", params=["mixtral", "llama"])
def models(request, tmp_path_factory):
    root, base = tmp_path_factory.mktemp("models"), make_model(request.param)
    paths = {"BASE": save(base, root / "base")}
    for i, name in enumerate("ABC"):
        layout = "stacked" if name == "A" else "published"
        paths[name] = save(make_model(request.param, i + 1, base), root / name, layout)
    return paths


def placed(text: str, paths: dict[str, str]) -> str:
    for name, path in paths.items():
        text = text.replace(f"model: {name}", f"model: {path}")
    return text


def theirs(text: str, out: Path) -> dict[str, torch.Tensor]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options)
    return load(out)


@pytest.mark.parametrize("name", RECIPES)
def test_agrees_with_mergekit(models, name, tmp_path):
    text = placed(RECIPES[name], models)
    expected, found = theirs(text, tmp_path / "theirs"), merged(text, tmp_path / "ours")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == found[key].dtype
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_drops_agree_by_their_statistics(tmp_path, method):
    base = make_model("llama", vocab_size=2000)
    tunes = [make_model("llama", seed, base, vocab_size=2000) for seed in (1, 2)]
    paths = [save(model, tmp_path / f"m{i}") for i, model in enumerate((base, *tunes))]
    lines = "".join(f"\n  - {{model: {path}, parameters: {{weight: 0.6, density: 0.4}}}}" for path in paths[1:])
    text = f"merge_method: {method}\nbase_model: {paths[0]}\nmodels:{lines}\n"
    states = theirs(text, tmp_path / "theirs"), merged(text, tmp_path / "ours")
    name = "model.embed_tokens.weight"
    moves = [(state[name] - base.state_dict()[name]).flatten() for state in states]
    for statistic in (lambda d: (d.abs() > 1e-6).float().mean(), lambda d: d.abs().mean(), lambda d: d.std()):
        expected, found = (statistic(move).item() for move in moves)
        assert found == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("source", ["union", "base"])
def test_vocabularies_agree_with_mergekit(tmp_path, source):
    """By token, for the order of added ones is free; tokens of one model, of several, and padding rows."""
    from transformers import AutoTokenizer

    vocabularies = [[*WORDS, "only-a"], [*reversed(WORDS), "both", "b"], [*WORDS, "both"]]
    paths = []
    for i, entries in enumerate(vocabularies):
        paths.append(save(make_model("llama", i, vocab_size=len(entries) + 2), tmp_path / f"m{i}"))
        Words(entries).save(paths[-1])
    lines = "".join(f"\n  - {{model: {path}, parameters: {{weight: {i + 1}.0}}}}" for i, path in enumerate(paths))
    text = f"merge_method: linear\nbase_model: {paths[0]}\nmodels:{lines}\n"
    text += f"tokenizer: {{source: {source}, pad_to_multiple_of: 8}}\n"
    expected, found = theirs(text, tmp_path / "theirs"), merged(text, tmp_path / "ours")
    mine, other = (AutoTokenizer.from_pretrained(tmp_path / n).get_vocab() for n in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert found[name].shape == expected[name].shape
        for token, i in mine.items():
            torch.testing.assert_close(found[name][i], expected[name][other[token]], rtol=1e-6, atol=1e-6, msg=token)
        torch.testing.assert_close(found[name][len(mine) :], expected[name][len(other) :], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gate_mode", ["cheap_embed", "hidden", "hidden_avg"])
def test_mixtures_agree_with_mergekit(tmp_path, gate_mode, monkeypatch):
    from mergekit.moe import router
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    from mergekit.scripts.moe import build

    words, paths = Words(), []
    for i in range(3):
        paths.append(save(make_model("mistral", i, vocab_size=words.size), tmp_path / f"m{i}"))
        words.save(paths[-1])
    raw = {
        "base_model": paths[0], "gate_mode": gate_mode, "dtype": "float32",
        "experts": [
            {"source_model": paths[1], "positive_prompts": ["the cat sat"], "negative_prompts": ["dog"]},
            {"source_model": paths[2], "positive_prompts": ["and the dog ran"], "residual_scale": 0.5},
        ],
    }  # fmt: skip
    load_it = AutoModelForCausalLM.from_pretrained  # mergekit asks for bf16, whose rounding hides differences
    asked = SimpleNamespace(from_pretrained=lambda path, **_: load_it(path, dtype=torch.float32))
    monkeypatch.setattr(router, "AutoModelForCausalLM", asked)
    build(MoEMergeConfig.model_validate(raw), str(tmp_path / "theirs"), MergeOptions(quiet=True, device="cpu"))
    expected, found = load(tmp_path / "theirs"), merged(raw, tmp_path / "ours")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)

"""Adapters extracted from a fine-tune: PEFT loads them, and merged into the base they are the fine-tune, as far as the
rank goes; factors are mergekit's."""

import json

import pytest
import safetensors.torch
import torch
from merge_fakes import load, make_model, save
from transformers import AutoModelForCausalLM

from moe_llm.cli import main
from moe_llm.errors import UserError
from moe_llm.merge.extract_lora import extract_lora, low_rank


@pytest.fixture(scope="module", params=["mixtral", "llama"])
def pair(request, tmp_path_factory):
    root, base = tmp_path_factory.mktemp(request.param), make_model(request.param)
    return save(base, root / "base"), save(make_model(request.param, 1, base), root / "tuned", "stacked")


def merged_by_peft(base, adapter):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def test_of_full_rank_the_adapter_is_the_fine_tune(pair, tmp_path):
    base, tuned = pair
    left_out = extract_lora(base, tuned, tmp_path / "a", rank=12)
    assert max(left_out.values()) < 1e-5
    found, expected = merged_by_peft(base, tmp_path / "a"), load(tuned)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_each_matrix_gets_the_nearest_one_of_its_rank(pair, tmp_path):
    """The singular values beyond the rank are all that is missing; norms are whole."""
    base, tuned = pair
    left_out = extract_lora(base, tuned, tmp_path / "a", rank=2)
    found, before, after = merged_by_peft(base, tmp_path / "a"), load(base), load(tuned)
    for name, share in left_out.items():
        delta, rest = after[name] - before[name], after[name] - found[name]
        values = torch.linalg.svdvals(delta)
        torch.testing.assert_close(rest.norm(), values[..., 2:].norm(), rtol=1e-3, atol=1e-5, msg=name)
        assert share == pytest.approx((rest.norm() / delta.norm()).item(), abs=1e-3)
    torch.testing.assert_close(found["model.norm.weight"], after["model.norm.weight"])


def test_patterns_and_small_singular_values(pair, tmp_path):
    base, tuned = pair
    extract_lora(base, tuned, tmp_path / "a", rank=8, include=["self_attn"], exclude=["k_proj"], sv_epsilon=0.3)
    stored = safetensors.torch.load_file(tmp_path / "a/adapter_model.safetensors")
    assert {name.split(".")[-3] for name in stored} == {"q_proj", "v_proj", "o_proj"}
    ranks = {len(tensor) for name, tensor in stored.items() if "lora_A" in name}
    assert min(ranks) >= 1
    assert len(ranks) > 1
    before, after, found = load(base), load(tuned), merged_by_peft(base, tmp_path / "a")
    name = "model.layers.1.self_attn.q_proj.weight"
    values = torch.linalg.svdvals(after[name] - before[name])
    gone = values[max(1, int((values > 0.3).sum())) :]
    torch.testing.assert_close((after[name] - found[name]).norm(), gone.norm(), rtol=1e-3, atol=1e-5)
    assert torch.equal(found["model.norm.weight"], before["model.norm.weight"])


def test_an_equal_model_has_an_adapter_that_adds_nothing(pair, tmp_path):
    base, _ = pair
    extract_lora(base, base, tmp_path / "a", rank=2)
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["modules_to_save"] is None
    before = load(base)
    for name, tensor in merged_by_peft(base, tmp_path / "a").items():
        torch.testing.assert_close(tensor, before[name], msg=name)


def test_the_factors_are_mergekits():
    extraction = pytest.importorskip("mergekit.scripts.extract_lora")
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 9), (9, 6), (8, 8)):
        delta = torch.randn(shape, generator=generator)
        for rank, epsilon in ((3, 0.0), (20, 0.0), (6, 1.5)):
            task = extraction.TaskVectorDecompositionTask.model_construct(
                max_rank=rank, distribute_scale=True, transpose=False, sv_epsilon=epsilon
            )
            for ours, theirs in zip(low_rank(delta, rank, epsilon), task.execute(task_vector=delta), strict=True):
                torch.testing.assert_close(ours, theirs)


def test_what_does_not_fit_is_refused(pair, tmp_path, capsys):
    base, tuned = pair
    other = save(make_model("mistral"), tmp_path / "other")
    with pytest.raises(UserError, match="give models of one architecture"):
        extract_lora(base, other, tmp_path / "a")
    with pytest.raises(UserError, match=r"pattern '\(' is no regular expression"):
        extract_lora(base, tuned, tmp_path / "a", include=["("])
    for patterns in ({"include": ["nothing"]}, {"exclude": [".*"]}):
        with pytest.raises(UserError, match=r"leave no tensor of .*: write patterns of names such as"):
            extract_lora(base, tuned, tmp_path / "a", **patterns)
    wide = save(make_model("mistral", vocab_size=30), tmp_path / "wide")
    with pytest.raises(UserError, match=r"\.?weight is \[24, 8\] .* and \[30, 8\]"):
        extract_lora(other, wide, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert main(["extract-lora", base, tuned, str(tmp_path / "a"), "--rank", "1"]) == 0
    assert "share of the difference that is left out" in capsys.readouterr().out
    assert main(["extract-lora", base, tuned, str(tmp_path / "a")]) == 2
    assert "exists already" in capsys.readouterr().err

"""What routers become in transformers: its logits where it has them, and by the code beside the weights elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import small_config
from support.ci import dear
from transformers import AutoModelForCausalLM

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.config.routers import ROUTER_SETTINGS
from moe_llm.families.architectures import CODED, OWN, architecture_of, export_note, is_mixtral
from moe_llm.model.init import init_weights

TOKENS = torch.randint(0, 24, (3, 17), generator=torch.Generator().manual_seed(1))
MODEL = {
    "dense": {"num_experts_per_tok": 4},
    "switch": {"num_experts_per_tok": 1},
    "top_p": {"num_experts_per_tok": 4},
    "lory": {"num_experts_per_tok": 1},
}
NEEDED = {
    "hierarchical": {"groups": 2},
    "soft_moe": {"slots_per_expert": 2, "segment_length": 4},
    "multi_head": {"heads": 2},
    "lory": {"segment_length": 4},
}
GATED = {"num_shared_experts": 2, "shared_expert_gate": True}
SHARED = {"num_shared_experts": 2}
GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
# router, its settings, the model's, transformers' model_type
CASES = [
    ("mixtral", {}, {}, "mixtral"),
    ("mixtral", {}, GATED, "qwen2_moe"),
    ("mixtral", {}, {**GATED, "sliding_window": 5}, "qwen2_moe"),
    ("mixtral", {}, SHARED, "moe_llm"),
    ("dense", {}, {}, "mixtral"),
    ("dense", {}, GATED, "qwen2_moe"),
    ("gshard", {}, {}, "mixtral"),
    ("noisy_top_k", {}, {}, "mixtral"),
    ("noisy_top_k", {}, GATED, "qwen2_moe"),
    ("noisy_top_k", {}, SHARED, "moe_llm"),
    ("switch", {}, {}, "moe_llm"),
    ("switch", {}, GATED, "qwen2_moe"),
    ("batch_prioritised", {}, {"sliding_window": 5}, "moe_llm"),
    ("batch_prioritised", {}, {**GATED, "tie_word_embeddings": True}, "qwen2_moe"),
    ("deepseek_moe", {}, SHARED, "moe_llm"),
    ("deepseek_moe", {"routed_scaling_factor": 2.0}, GATED, "moe_llm"),
    ("deepseek_moe", {"norm_topk_prob": True}, {}, "mixtral"),
    ("deepseek_moe", {"norm_topk_prob": True}, GATED, "qwen2_moe"),
    ("deepseek_moe", {}, GATED, "qwen2_moe"),
    ("bias_balanced", {}, SHARED, "glm4_moe"),
    ("bias_balanced", GROUPS, SHARED, "glm4_moe"),
    ("bias_balanced", {"norm_topk_prob": False}, {**SHARED, "tie_word_embeddings": True}, "glm4_moe"),
    ("bias_balanced", {}, {**SHARED, "sliding_window": 5}, "moe_llm"),
    ("bias_balanced", {"score": "softmax", "norm_topk_prob": False}, SHARED, "moe_llm"),
    ("bias_balanced", GROUPS, {}, "moe_llm"),
    ("top_p", {"p": 0.7}, {}, "moe_llm"),
    ("hierarchical", {"groups_per_token": 2}, SHARED, "moe_llm"),
    ("hierarchical", {}, {}, "moe_llm"),
    ("balanced", {}, {}, "moe_llm"),
    ("soft_moe", {}, SHARED, "moe_llm"),
    ("multi_head", {}, SHARED, "moe_llm"),
    ("multi_head", {"norm_topk_prob": True}, {"sliding_window": 5}, "moe_llm"),
    ("soft_moe", {"normalize": False}, {"sliding_window": 5, "tie_word_embeddings": True}, "moe_llm"),
    ("lory", {}, {}, "moe_llm"),
    ("lory", {"segment_length": 5}, {**GATED, "sliding_window": 5}, "moe_llm"),
    ("expert_choice", {}, {}, "moe_llm"),
    ("attention", {"heads": 2, "key_size": 4, "temperature": 0.5}, {}, "moe_llm"),
    ("transformer", {"width": 8, "heads": 2, "window": 4}, SHARED, "moe_llm"),
    ("transformer", {"width": 8, "heads": 2}, {"sliding_window": 5}, "moe_llm"),
    ("reinforce", {"load_coef": 0.1}, {}, "moe_llm"),
    ("reinforce", {"baseline": "leave_one_out"}, SHARED, "moe_llm"),
    ("em", {}, {}, "mixtral"),
    ("em", {}, GATED, "qwen2_moe"),
    ("expert_choice", {"capacity_factor": 0.5}, SHARED, "moe_llm"),
]


def model_of(kind: str, settings: dict, more: dict) -> MoEForCausalLM:
    router = {"type": kind, **NEEDED.get(kind, {}), **settings}
    config = small_config(router=router, initializer_range=0.3, **{**MODEL.get(kind, {}), **more})
    model = MoEForCausalLM(config)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(4)
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.any():
            tensor.data.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *case[1], *case[2]]))
def saved(request, tmp_path):
    """Model, directory, transformers' model_type."""
    kind, settings, more, architecture = request.param
    model = model_of(kind, settings, more)
    model.save_pretrained(tmp_path)
    return model, tmp_path, architecture


@torch.no_grad()
def test_transformers_logits_are_ours_and_its_files_come_back(saved, tmp_path_factory):
    model, directory, architecture = saved
    theirs, report = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, experts_implementation="eager", trust_remote_code=architecture == "moe_llm"
    )
    assert theirs.config.model_type == architecture == json.loads((directory / "config.json").read_text())["model_type"]
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    unused = architecture_of(model.config).unused
    assert {str(key).rpartition(".")[2] for key in report["unexpected_keys"]} == set(unused)
    logits = model(TOKENS).logits
    torch.testing.assert_close(theirs.eval()(TOKENS).logits, logits, rtol=1e-5, atol=1e-5)

    again = MoEForCausalLM.from_pretrained(directory)
    assert again.config == model.config
    assert torch.equal(again(TOKENS).logits, logits)
    if unused or architecture != "mixtral":
        back = tmp_path_factory.mktemp("back")
        theirs.save_pretrained(back)
        again = MoEForCausalLM.from_pretrained(back)
        assert torch.equal(again(TOKENS).logits, logits)


def test_every_router_has_a_case():
    assert {kind for kind, *_ in CASES} == set(CODED) <= set(ROUTER_SETTINGS)


def test_what_is_said_before_training():
    notes = {
        (kind, architecture): export_note(model_of(kind, settings, more).config)
        for kind, settings, more, architecture in CASES
    }
    assert notes["mixtral", "mixtral"] is None
    assert "Qwen2MoeForCausalLM" in notes["deepseek_moe", "qwen2_moe"]
    assert "trust_remote_code=True" in notes["top_p", "moe_llm"]
    assert "num_shared_experts=2" in notes["mixtral", "moe_llm"]
    assert "noise_weight" in notes["noisy_top_k", "qwen2_moe"]


def test_the_routers_that_are_mixtrals_in_evaluation():
    assert is_mixtral(model_of("mixtral", {}, SHARED).config)
    assert is_mixtral(model_of("deepseek_moe", {"norm_topk_prob": True}, {}).config)
    assert not is_mixtral(model_of("deepseek_moe", {}, {}).config)
    assert not is_mixtral(model_of("bias_balanced", {}, {}).config)


def test_without_trust_it_is_refused_rather_than_read_as_another_model(tmp_path):
    model_of("top_p", {}, {}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)


REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert not any(name.partition(".")[0] == "moe_llm" for name in sys.modules), "the package is imported"
tokens = torch.tensor([[1, 5, 9, 2], [7, 7, 3, 20]])
greedy = model.generate(tokens, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
whole = tokens
for _ in range(7):
    whole = torch.cat([whole, model(whole, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
assert torch.equal(greedy, whole)
plain = model(tokens, labels=tokens)
plain.loss.backward()
with_aux = model(tokens, labels=tokens, output_router_logits=True)
assert [layer.shape for layer in with_aux.router_logits] == [(8, 4)] * 2
assert torch.allclose(with_aux.loss, plain.loss + model.router_aux_loss_coef * with_aux.aux_loss)
assert all(p.grad is not None for n, p in model.named_parameters() if ".gate.weight" in n)
"""


def without_the_package(script: str, folder: Path, *arguments: str) -> None:
    """A script on the checkpoint `folder/model`, in a process that cannot import this package."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder / "model"), *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", dear(["balanced", "lory", "expert_choice"], "lory"))
def test_the_code_beside_the_weights_stands_alone_and_generates(tmp_path, kind):
    """In a process that cannot import the package; with the cache it says what it says without."""
    model_of(kind, {}, SHARED).save_pretrained(tmp_path / "model")
    without_the_package(REMOTE, tmp_path)


GENERATED = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert not any(name.partition(".")[0] == "moe_llm" for name in sys.modules), "the package is imported"
tokens = torch.tensor([[1, 5, 9, 2, 11], [7, 7, 3, 20, 6]])
mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
options = dict(max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
for row in (0, 1):  # the second without its padding
    whole = tokens[row, mask[row].bool()][None]
    alone = model.generate(whole, max_new_tokens=9, do_sample=False, pad_token_id=0)
    for _ in range(9):
        whole = torch.cat([whole, model(whole).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(alone, whole[:, : alone.shape[1]])
    together = model.generate(tokens, attention_mask=mask, **options)[row]
    assert torch.equal(together[len(tokens[row]) - mask[row].sum():], whole[0]), (together, whole)
texts = [torch.arange(1, 12)[None], torch.arange(5, 20)[None]]  # packed, as positions that begin anew say
positions = torch.cat([torch.arange(11), torch.arange(15)])[None]
packed = model(torch.cat(texts, 1), position_ids=positions, use_cache=False).logits
assert torch.allclose(packed, torch.cat([model(text).logits for text in texts], 1), atol=1e-5)
if sys.argv[2] == "no cache":
    try:
        model.generate(tokens, use_cache=True, **options)
    except ValueError as error:
        assert "use_cache=False" in str(error)
    else:
        raise AssertionError("a cache was taken")
with_aux = model(tokens, labels=tokens, attention_mask=mask, output_router_logits=True)
assert 0 < with_aux.aux_loss < 4
assert {layer.shape for layer in with_aux.router_logits} == {(10, 4)}
with_aux.loss.backward()
assert all(p.grad is not None for p in model.parameters())
"""


@pytest.mark.parametrize(
    ("kind", "cache"), dear([("soft_moe", "no cache"), ("multi_head", "cache")], ("multi_head", "cache"))
)
def test_what_is_routed_in_the_tokens_place_generates_by_default(tmp_path, kind, cache):
    """What whole passes say, one after the other, also with padding on the left."""
    model_of(kind, {}, SHARED).save_pretrained(tmp_path / "model")
    without_the_package(GENERATED, tmp_path, cache)


@torch.no_grad()
def test_segments_begin_with_the_text_whichever_side_the_padding_is_on(tmp_path):
    model = model_of("lory", {}, {})
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    mask = torch.ones_like(TOKENS)
    mask[1, :6] = mask[2, 9:] = 0
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    ours, exported = model(TOKENS, **options).logits, theirs(TOKENS, **options).logits
    torch.testing.assert_close(exported[mask.bool()], ours[mask.bool()], rtol=1e-5, atol=1e-5)
    alone = model(TOKENS[1:2, 6:]).logits
    torch.testing.assert_close(ours[1, 6:], alone[0], rtol=1e-5, atol=1e-5)
    text = theirs.generate(TOKENS[1:2, 6:], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    batch = theirs.generate(
        TOKENS[:2], attention_mask=mask[:2], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(batch[1:, 6:], text)
    with pytest.raises(ValueError, match="needs a DynamicCache"):
        theirs.generate(TOKENS, max_new_tokens=2, cache_implementation="static")


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"sliding_window": 5}], ids=["whole", "sliding"])
def test_what_the_cache_keeps_of_segments_follows_beams_and_parts_of_a_text(tmp_path, more):
    model_of("lory", {}, more).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 3):
        with_cache, without = (
            theirs.generate(TOKENS, num_beams=beams, use_cache=cached, **options) for cached in (True, False)
        )
        assert torch.equal(with_cache, without)
    whole, cache, parts = theirs(TOKENS, use_cache=False).logits, None, []
    for part in TOKENS.split([6, 1, 3, 7], dim=1):
        output = theirs(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_bf16_keeps_the_bias_in_fp32(tmp_path):
    for more, native in ((SHARED, True), ({}, False)):
        model = model_of("bias_balanced", {}, more)
        bias_E = model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
        bias_E.fill_(1 + 2**-20)
        model.save_pretrained(tmp_path, dtype="bf16")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", trust_remote_code=not native)
        found_E = theirs.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
        assert torch.equal(found_E, bias_E)
        assert theirs.lm_head.weight.dtype == torch.bfloat16


def test_without_our_key_it_is_a_published_checkpoint_of_its_family(tmp_path):
    model = model_of("bias_balanced", {}, SHARED)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["moe_llm"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    again = MoEForCausalLM.from_pretrained(tmp_path)
    assert again.config.architecture == "glm4_moe"
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    shutil.rmtree(tmp_path)
    assert OWN.code is False

"""Checkpoints to and from transformers: identical tensors, and the same logits."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.checkpoints import FakeState, random_tensors, save_arguments, small_config
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from moe_llm import MoEForCausalLM
from moe_llm.checkpoint.safetensors_io import TensorFiles
from moe_llm.checkpoint.state import save_checkpoint
from moe_llm.checkpoint.weights import Weights
from moe_llm.distributed.engine import shard_experts
from moe_llm.errors import UserError
from moe_llm.families import hf
from moe_llm.model.decoder import MoEDecoder

VARIANTS = [{}, {"tie_word_embeddings": True}]
ONE_EXPERT = {"num_local_experts": 1, "num_experts_per_tok": 1}  # leaves as Mistral, and may come as Mixtral


def theirs(config, dtype=torch.float32):
    content = hf.to_transformers_config(config, bos_token_id=1, eos_token_id=2, dtype="fp32")
    content |= {"num_local_experts": config.num_local_experts, "num_experts_per_tok": config.num_experts_per_tok}
    torch.manual_seed(0)
    mixtral = MixtralConfig(**content, attn_implementation="eager", experts_implementation="eager")
    return MixtralForCausalLM(mixtral).to(dtype).eval()


def ours(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = MoEForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.to(dtype).eval()


def assert_same(model, other):
    state = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
    assert set(state) == set(model.state_dict())


@pytest.mark.parametrize("shard", ["5GB", "1KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [*VARIANTS, ONE_EXPERT])
def test_theirs_loads_here(tmp_path, changes, dtype, shard):
    source = theirs(small_config(**changes), dtype)
    source.save_pretrained(tmp_path, max_shard_size=shard)
    model = MoEForCausalLM.from_pretrained(tmp_path)
    assert not model.training
    assert_same(model, source)
    if dtype == torch.float32:
        ids = torch.randint(0, 24, (2, 9))
        torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shard", ["5GB", "1KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", VARIANTS)
def test_ours_loads_there(tmp_path, changes, dtype, shard):
    model = ours(small_config(**changes), dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(model, loaded)
    assert_same(model, MoEForCausalLM.from_pretrained(tmp_path))
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_dtypes_on_the_way_in_and_out(tmp_path):
    model = ours(small_config())
    model.save_pretrained(tmp_path, dtype="bf16")
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for dtype in (torch.float32, "fp32"):
        assert_same(ours(small_config()).bfloat16().float(), MoEForCausalLM.from_pretrained(tmp_path, dtype))
    with pytest.raises(UserError, match="dtype='int4'"):
        MoEForCausalLM.from_pretrained(tmp_path, "int4")


def test_ties_are_kept(tmp_path):
    ours(small_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    model = MoEForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in safetensors.torch.load_file(tmp_path / "model.safetensors")


def test_a_tied_head_that_is_stored_all_the_same(tmp_path):
    """Older files hold it twice; where the two differ, tying would throw one away."""
    model = ours(small_config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    assert_same(model, MoEForCausalLM.from_pretrained(tmp_path))
    stored["lm_head.weight"] += 1
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings"):
        MoEForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("style", ["stacked, mlp", "stacked, block_sparse_moe", "per expert, mlp", "old buffers"])
def test_styles_of_names_that_are_about(tmp_path, style):
    model = ours(small_config())
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    if style.startswith("stacked"):
        stored = {name: p.detach() for name, p in model.named_parameters()}
        if style.endswith("moe"):
            stored = {hf.published_name(name): tensor for name, tensor in stored.items()}
            assert "model.layers.0.block_sparse_moe.experts.down_proj" in stored
    elif style == "per expert, mlp":
        stored = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in stored.items()}
        assert "model.layers.0.mlp.experts.3.w2.weight" in stored
    else:
        stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    assert_same(model, MoEForCausalLM.from_pretrained(tmp_path))
    weights = Weights(TensorFiles(tmp_path))
    for name, parameter in model.named_parameters():
        first = 1 if hf.is_expert(name) else None
        held = parameter[1:3] if hf.is_expert(name) else parameter
        assert torch.equal(weights.read(name, tuple(held.shape), first), held), name


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (
            lambda s: s.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"),
            r"missing model\.layers\.1\.\S*2\.w3",
        ),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected extra"),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(9)}),
            r"model\.norm\.weight \[9\] instead of \[8\]",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(8, dtype=torch.int32)}),
            r"whole numbers model\.norm\.weight",
        ),
        (lambda s: s.update({"model.layers.0.mlp.gate.weight": torch.ones(4, 8)}), "one and the same"),
        (
            lambda s: s.update({"model.layers.0.mlp.experts.down_proj": torch.ones(3, 8, 6)}),
            "unexpected.*and 1 more",
        ),
        (lambda s: s.clear(), "and 38 more"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, spoil, named):
    model = ours(small_config())
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    spoil(stored)
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=named):
        MoEForCausalLM.from_pretrained(tmp_path)


def test_a_directory_that_is_none(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        MoEForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_saving_over_an_earlier_save_leaves_none_of_it(tmp_path):
    """A stale single file beside new shards would be loaded instead of them."""
    ours(small_config()).save_pretrained(tmp_path)
    changed = MoEForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        changed.model.norm.weight.add_(1)
    changed.save_pretrained(tmp_path, max_shard_size="1KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(changed, MoEForCausalLM.from_pretrained(tmp_path))
    changed.save_pretrained(tmp_path)
    assert [p.name for p in sorted(tmp_path.glob("*.safetensors*"))] == ["model.safetensors"]
    assert not list(tmp_path.glob(".tmp*"))
    assert_same(changed, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_token_ids_and_our_own_settings_survive(tmp_path):
    config = small_config(router_z_loss_coef=0.5, router_aux_loss_scope="transformers")
    theirs(config).save_pretrained(tmp_path / "a")
    MoEForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    model = MoEForCausalLM.from_pretrained(tmp_path / "b")
    assert model.token_ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert model.config == config
    generation = json.loads((tmp_path / "b/generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)


class Tokenizer:
    bos_token_id, eos_token_id, pad_token_id = 5, 6, None

    def save_pretrained(self, directory):
        with open(f"{directory}/tokenizer.json", "w") as file:
            file.write("{}")


def test_the_tokenizer_goes_along(tmp_path):
    config = small_config()
    ours(config).save_pretrained(tmp_path / "a", Tokenizer())
    path = save_checkpoint(
        tmp_path / "b", FakeState(random_tensors(config)), **save_arguments(config, tokenizer=Tokenizer())
    )
    for directory in (tmp_path / "a", path):
        assert (directory / "tokenizer.json").read_text() == "{}"
        assert MoEForCausalLM.from_pretrained(directory).token_ids["eos_token_id"] == 6
    assert "tokenizer.json" in json.loads((path / "trainer/manifest.json").read_text())["files"]


def test_a_training_checkpoint_loads_here(tmp_path):
    config = small_config()
    tensors = random_tensors(config)
    path = save_checkpoint(tmp_path, FakeState(tensors), **save_arguments(config))
    for name, parameter in MoEForCausalLM.from_pretrained(path).named_parameters():
        assert torch.equal(parameter, tensors[name, "weight"]), name


def test_a_part_of_the_experts_is_not_saved_as_a_model(tmp_path):
    model = ours(small_config())
    shard_experts(model, range(0, 2))
    with pytest.raises(AssertionError, match="all of its experts"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_the_decoder_has_the_shapes_of_the_table(tied):
    config = small_config(tie_word_embeddings=tied)
    with torch.device("meta"):
        model = MoEDecoder(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == hf.parameter_shapes(config)


def test_a_crash_at_any_moment_of_a_save_over_a_model_leaves_one_whole_model_or_a_refusal(tmp_path, monkeypatch):
    """The old and the new one have the same shapes and other weights and another configuration."""
    models = [MoEForCausalLM(small_config(num_experts_per_tok=k)) for k in (1, 2)]
    for model in models:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    states = [model.state_dict() for model in models]

    class Crash(Exception):
        pass

    def dying(planted, owner, name, left):
        real = getattr(owner, name)

        def wrapped(*args, **options):
            if not left:
                raise Crash
            left.pop()
            return real(*args, **options)

        planted.setattr(owner, name, wrapped)

    outcomes = []
    for point in range(40):
        directory = tmp_path / str(point)
        models[0].save_pretrained(directory, max_shard_size="4KB")
        with monkeypatch.context() as planted:
            left = [None] * point
            dying(planted, os, "replace", left)
            dying(planted, Path, "unlink", left)
            try:
                models[1].save_pretrained(directory, max_shard_size="3KB")
                ended = True
            except Crash:
                ended = False
        try:
            found = MoEForCausalLM.from_pretrained(directory)
        except UserError:
            outcomes.append("refused")
            continue
        which = found.config.num_experts_per_tok - 1
        assert all(torch.equal(tensor, states[which][name]) for name, tensor in found.state_dict().items())
        outcomes.append(("old", "new")[which])
        if ended:
            break
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"
    assert ended
    assert not list(directory.glob(".tmp*"))

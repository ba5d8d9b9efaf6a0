"""Properties of the model that hold without any other implementation to compare with."""

import pytest
import torch

from moe_llm.config import ModelConfig
from moe_llm.distributed.engine import shard_experts
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.init import build_model
from moe_llm.model.moe.experts import MoELayer

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    router_z_loss_coef=0.1,
    initializer_range=0.2,
)


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: MoEDecoder) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def test_num_params_is_what_the_module_has():
    for tied in (False, True):
        config = CONFIG.model_copy(update={"tie_word_embeddings": tied, "head_dim": 10})
        assert sum(p.numel() for p in MoEDecoder(config).parameters()) == config.num_params()


def test_a_token_sees_no_later_token():
    model = build_model(CONFIG, 0)
    a = ids(1, 20)
    b = a.clone()
    b[0, 12:] = ids(1, 8, seed=1)
    torch.testing.assert_close(model(a).logits[:, :12], model(b).logits[:, :12])


def test_documents_in_a_block_compute_as_if_alone():
    model = build_model(CONFIG, 0)
    parts = [ids(1, n, seed=n) for n in (7, 1, 11)]
    packed = torch.cat(parts, dim=1)
    documents = torch.tensor([[d for d, part in enumerate(parts) for _ in range(part.shape[1])]])
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    together = model(packed, document_ids=documents, position_ids=positions).logits
    alone = torch.cat([model(part).logits for part in parts], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(packed).logits, alone, atol=1e-2)  # and without the ids they do see each other


@pytest.mark.parametrize("garbage", [0, 96])
def test_padding_changes_nothing(garbage):
    model = build_model(CONFIG, 0)
    row = ids(1, 9)
    alone = model(row, labels=row)
    alone.loss.backward()
    expected = gradients(model)
    padded = torch.cat([row, torch.full((1, 6), garbage)], dim=1)
    mask = torch.cat([torch.ones(1, 9), torch.zeros(1, 6)], dim=1)
    labels = padded.masked_fill(mask == 0, -100)
    output = model(padded, attention_mask=mask, labels=labels)
    output.loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    for name in ("loss", "aux_loss", "z_loss"):
        torch.testing.assert_close(getattr(output, name), getattr(alone, name), rtol=1e-5, atol=1e-6)
    assert output.routing.num_tokens.tolist() == [9.0, 9.0]


def test_z_loss_is_the_mean_squared_log_partition():
    model = build_model(CONFIG, 0)
    seen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda m, i, out: seen.append(out.logits_TE))
        for layer in model.model.layers
    ]
    output = model(ids(2, 16))
    expected = torch.stack([logits.logsumexp(-1).square().mean() for logits in seen]).mean()
    torch.testing.assert_close(output.z_loss, expected)
    for hook in hooks:
        hook.remove()


def test_statistics_of_parts_add_up_to_those_of_the_whole():
    model = build_model(CONFIG, 0).eval()
    batch = ids(6, 16)
    whole = model(batch).routing
    parts = [model(part).routing for part in batch.split([1, 3, 2])]
    for name in whole._fields:
        torch.testing.assert_close(
            sum(getattr(p, name) for p in parts), getattr(whole, name), rtol=1e-5, atol=1e-4, msg=name
        )


def test_jitter_acts_in_training_only_and_on_the_router_only():
    config = CONFIG.model_copy(update={"router_jitter_noise": 0.5})
    model = build_model(config, 0)
    batch = ids(2, 16)
    assert not torch.equal(model(batch).z_loss, model(batch).z_loss)
    model.eval()
    assert torch.equal(model(batch).z_loss, model(batch).z_loss)
    # With every expert chosen and the router undecided, noise on the router's input cannot reach the output.
    config = config.model_copy(update={"num_experts_per_tok": 4})
    model = build_model(config, 0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    torch.testing.assert_close(model(batch).logits, model(batch).logits, rtol=0, atol=0)


def test_recomputation_gives_the_same_loss_and_gradients_with_noise():
    config = CONFIG.model_copy(update={"router_jitter_noise": 0.3})
    batch = ids(2, 16)
    results = []
    for recompute in (False, True, "selective"):
        model = build_model(config, 0)
        model.model.recompute = recompute
        torch.manual_seed(5)
        output = model(batch, labels=batch)
        output.loss.backward()
        results.append((output.loss, gradients(model)))
    for loss, found in results[1:]:
        assert torch.equal(results[0][0], loss)
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_routes_as_the_first_pass_did_even_if_its_arithmetic_differs(monkeypatch, recompute):
    """torchtitan #3336: a second pass that routes differently computes the gradient of another function."""
    from moe_llm.model.moe.routers.mixtral import MixtralRouter

    chosen: list[torch.Tensor] = []
    original = MixtralRouter.forward

    def perturbed(self, x_BSD, mask_BS, document_BS=None):
        passes = len(chosen) // CONFIG.num_hidden_layers
        noise = 0.5 * torch.sin(torch.arange(x_BSD.numel())).view_as(x_BSD)
        routing = original(self, x_BSD + passes * noise, mask_BS, document_BS)
        chosen.append(routing.token_index_N)
        return routing

    monkeypatch.setattr(MixtralRouter, "forward", perturbed)
    model = build_model(CONFIG, 0)
    model.model.recompute = recompute
    batch = ids(2, 16)
    model(batch, labels=batch).loss.backward()
    first, second = chosen[: CONFIG.num_hidden_layers], chosen[CONFIG.num_hidden_layers :]
    assert len(second) == len(first)
    for a, b in zip(first, reversed(second)):
        assert torch.equal(a, b)


def test_initialisation_does_not_depend_on_which_experts_a_rank_holds():
    whole = build_model(CONFIG, 3)
    for experts in (range(0, 2), range(2, 4), range(1, 2)):
        part = build_model(CONFIG, 3, prepare=lambda m, e=experts: shard_experts(m, e))
        for (name, a), b in zip(whole.named_parameters(), part.parameters()):
            expected = a[experts.start : experts.stop] if ".experts." in name else a
            assert torch.equal(b, expected), name


def test_initialisation_depends_on_the_seed_and_has_the_stated_deviation():
    a, b = build_model(CONFIG, 0), build_model(CONFIG, 1)
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p))
            continue
        assert not torch.equal(p, q), name
        residual = name.endswith("down_proj") or "o_proj" in name
        expected = CONFIG.initializer_range / (2 if residual else 1)  # sqrt(2 * 2 layers)
        assert abs(p.std().item() / expected - 1) < 0.15, name


def test_tied_weights_are_one_tensor_after_building_on_meta():
    model = build_model(CONFIG.model_copy(update={"tie_word_embeddings": True}), 0)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_every_expert_gets_a_gradient_tensor_even_without_tokens():
    model = build_model(CONFIG, 0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # ties: top-k picks the same experts for every token
    batch = ids(2, 16)
    output = model(batch, labels=batch)
    output.loss.backward()
    for layer in model.model.layers:
        assert isinstance(layer.mlp, MoELayer)
        for parameter in layer.mlp.experts.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
    empty = output.routing.tokens_per_expert_E == 0
    assert empty.any()

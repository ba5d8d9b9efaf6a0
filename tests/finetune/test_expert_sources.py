"""`finetune.expert_sources`: tokens of a source reach its experts alone while training, and go freely afterwards."""

import pytest
import torch
from support import runs

from moe_llm.cli import main
from moe_llm.config import ModelConfig
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.init import init_weights

SIZES = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}
ROUTERS = [
    {"type": "mixtral"},
    {"type": "deepseek_moe", "n_group": 3, "topk_group": 2},
    {"type": "bias_balanced", "n_group": 3, "topk_group": 2},
    {"type": "mixtral", "warmup_steps": 10},
    {"type": "noisy_top_k", "entropy_bonus_coef": 0.1},
    {"type": "bias_balanced", "entropy_bonus_coef": 0.1, "global_entropy_coef": 0.1},
    {"type": "em", "global_entropy_coef": 0.1},
]
TOKENS = torch.randint(0, 24, (3, 9), generator=torch.Generator().manual_seed(0))
ALLOWED = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]], dtype=torch.bool)


def model_of(router) -> MoEDecoder:
    model = MoEDecoder(ModelConfig(**SIZES, router=router))
    init_weights(model, 0)
    for buffer in model.buffers():
        buffer.normal_(0, 3.0, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: "-".join(router))
def test_a_sources_tokens_reach_its_experts_alone(router):
    model = model_of(router)
    model.source_experts_XE = ALLOWED
    for source, allowed_E in enumerate(ALLOWED):
        sources = torch.full((3,), source)
        output = model(TOKENS, labels=TOKENS, sources=sources)
        counts_LE = output.routing.tokens_per_expert_E
        assert (counts_LE[:, ~allowed_E] == 0).all()
        assert counts_LE.sum() == 2 * 2 * TOKENS.numel()
        model.zero_grad()
        output.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        gradient_E = model.model.layers[0].mlp.experts.down_proj.grad.abs().sum((1, 2))
        assert ((gradient_E != 0) == allowed_E).all()


def test_what_overflows_is_passed_on_to_the_sources_experts_alone():
    model = model_of({"type": "mixtral", "capacity_factor": 0.5, "overflow": "next"})
    model.source_experts_XE = ALLOWED
    counts_LR: list[int] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: counts_LR.append(inputs[1].tolist()))
    model(TOKENS, sources=torch.zeros(3, dtype=torch.long))
    assert all(sum(counts) and not sum(counts[e] for e in (1, 3, 4, 5)) for counts in counts_LR)


@pytest.mark.parametrize("router", ROUTERS[:3], ids=lambda router: "-".join(router))
def test_rows_are_apart_and_evaluation_is_free(router):
    model, free = model_of(router), model_of(router)
    model.source_experts_XE = ALLOWED
    mixed = model(TOKENS, sources=torch.tensor([0, 1, 0])).logits
    for row, source in enumerate((0, 1, 0)):
        alone = model(TOKENS[row : row + 1], sources=torch.tensor([source])).logits
        torch.testing.assert_close(alone[0], mixed[row], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mixed, free(TOKENS).logits)
    assert torch.equal(model.eval()(TOKENS, sources=torch.tensor([0, 1, 0])).logits, free.eval()(TOKENS).logits)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    return [runs.write_text(root / f"{name}.txt") for name in "ab"], root


def run_file(texts, directory, expert_sources, **model):
    paths, root = texts
    raw = runs.sections(paths[0], root / "cache", directory / "run", train={"max_steps": 2}, logging={"console": "off"})
    raw["data"]["sources"] = [{"type": "files", "path": str(path), "document": "line"} for path in paths]
    raw["finetune"] = {"expert_sources": expert_sources}
    raw["model"] = {**raw["model"], **model}
    return str(runs.write_yaml(directory / "run.yaml", raw))


def test_a_run_sends_no_token_to_other_experts(texts, tmp_path):
    assert main(["train", run_file(texts, tmp_path, [[0, 1], [1, 2]])]) == 0
    records = runs.records(tmp_path / "run")
    counts = [record["moe"]["tokens_per_expert"] for record in records if "moe" in record]
    assert counts
    assert all(layer[3] == 0 and sum(layer) > 0 for record in counts for layer in record)


@pytest.mark.parametrize(
    ("given", "model", "sentence"),
    [
        ([[0, 1]], {}, "finetune.expert_sources has 1 entries for 2 data.sources"),
        ([[0, 9], None], {}, "names expert 9"),
        ([[0, 0], None], {}, "fewer than model.num_experts_per_tok=2"),
        ([[0, 1], None], {"router": {"type": "top_p"}}, "model.router.type=top_p"),
    ],
)
def test_mistakes_are_one_sentence(texts, tmp_path, capsys, given, model, sentence):
    assert main(["train", run_file(texts, tmp_path, given, **model)]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1

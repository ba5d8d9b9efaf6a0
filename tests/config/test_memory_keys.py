"""Keys that save memory: what they do not go with is refused in one sentence."""

from pathlib import Path

import pytest

from moe_llm.config import load_config
from moe_llm.config.load import validate
from moe_llm.errors import UserError

NARROW = {"parallel": {"gradient_dtype": "bf16"}}
KAHAN = {"parallel": {"gradient_dtype": "bf16"}, "optim": {"master_weights": "kahan"}}


def run(**sections):
    raw = {
        "run": {"dir": "unused"},
        "data": {"sources": [{"type": "python_stdlib"}], "sequence_length": 32},
        "model": {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
        "train": {"max_steps": 1, "precision": "bf16"},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return validate(raw)


def test_what_goes_together_is_taken():
    for stage in (1, 2, 3):
        parallel = {**KAHAN["parallel"], "zero_stage": stage}
        assert run(**{**KAHAN, "parallel": parallel}).optim.master_weights == "kahan"
    assert run(train={"activation_offload": True, "tiled_mlp": 4, "activation_checkpointing": "selective"})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({**NARROW, "train": {"precision": "fp32"}}, "train.precision=fp32, which has fp32 gradients"),
        ({"parallel": {"gradient_dtype": "bf16", "offload_optimizer": "cpu"}}, "sums fp32 gradients in host memory"),
        ({"parallel": {"offload_optimizer": "nvme"}}, "needs a directory for its files: set parallel.nvme_path"),
        ({"parallel": {"nvme_path": "/tmp"}}, "holds nothing: set offload_optimizer: nvme"),
        ({"parallel": {"offload_optimizer": "cpu", "nvme_path": "/tmp"}}, "holds nothing: set offload_optimizer: nvme"),
        (
            {"parallel": {"gradient_dtype": "bf16", "offload_optimizer": "nvme", "nvme_path": "/tmp"}},
            "parallel.offload_optimizer=nvme, which sums fp32 gradients",
        ),
        ({"optim": {"master_weights": "kahan"}}, "parallel.gradient_dtype=fp32, which is wider than the weights"),
        ({**KAHAN, "optim": {"master_weights": "kahan", "name": "sgd"}}, "optim.name=sgd, which knows no bf16 weights"),
        ({**KAHAN, "finetune": {"experts": [0]}, "model": {"init_from": "x"}}, "decays rows of stacked weights"),
        ({"train": {"tiled_mlp": 0}}, "tiled_mlp"),
    ],
)
def test_what_does_not_is_refused_with_its_remedy(sections, words):
    with pytest.raises(UserError) as refused:
        run(**sections)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert ": " in str(refused.value)


def test_shipped_configurations_keep_their_precision():
    """Narrower state is asked for, never assumed."""
    config = load_config(Path(__file__).parents[2] / "configs/mixtral_8x7b.yaml")
    assert (config.parallel.gradient_dtype, config.optim.master_weights) == ("fp32", "fp32")

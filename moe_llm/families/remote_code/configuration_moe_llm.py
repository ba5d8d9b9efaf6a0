"""Configuration of a mixture-of-experts language model trained with moe_llm, for transformers."""

from transformers import MixtralConfig


class MoELLMConfig(MixtralConfig):
    """Mixtral's configuration, and under `moe_llm` what it has no field for: `router` with its `type` and settings,
    `num_shared_experts` and `shared_expert_gate`."""

    model_type = "moe_llm"

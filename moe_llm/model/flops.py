"""Floating-point operations of a training step, by arithmetic."""

from moe_llm.config import ModelConfig


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Operations of forward and backward for one token of a causal sequence, recomputation not counted.

    Six per active matrix parameter (two forward, four backward), the embedding look-up excluded, as many for what
    routers mix besides, and attention's two products over S/2 visible positions on average (Chowdhery et al. 2022,
    appendix B; causal half counted once).
    """
    counts = config.parameter_counts()
    matrices: float = config.num_params(active=True) - counts["embed_tokens"] - counts["norms"]
    again = config.router.active_experts(config) - config.num_local_experts  # by more rows than there are experts
    more = max(0, again) * config.expert_parameters + config.router.mixed_per_token(config)
    matrices += config.num_moe_layers * more
    if config.tie_word_embeddings:
        matrices += counts["embed_tokens"]  # the head multiplies by it
    visible = sum(min(sequence_length, 2 * (window or sequence_length)) / 2 for window in config.windows)
    attention = 4 * config.num_attention_heads * config.attention_head_dim * visible
    return 6.0 * matrices + 3.0 * attention

"""Activation checkpointing under which the second pass routes as the first one did."""

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# The outputs of these decide who goes where. They are kept (a few integers a token), all else is computed again:
# a recomputation that differs in the last bit can then not send a token elsewhere, which under expert
# parallelism would also make the ranks disagree about the sizes they exchange.
_ROUTING_OPS = frozenset({torch.ops.aten.topk.default})


def _policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _ROUTING_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def keep_routing():
    """`context_fn` of torch.utils.checkpoint.checkpoint."""
    return create_selective_checkpoint_contexts(_policy)

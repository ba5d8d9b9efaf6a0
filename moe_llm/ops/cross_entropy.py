"""Cross-entropy of a linear head without ever holding all logits.

Dimensions: T tokens (C: of one chunk), D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from moe_llm.ops import liger, native
from moe_llm.ops.compiled import region
from moe_llm.ops.native import graph_is_kept
from moe_llm.ops.products import compiled_by_shape, mm
from moe_llm.ops.shapes import round_up

# scratch for the logits of one chunk: large enough that adding to the (V, D) weight gradient is a small share
# of a chunk's work, small beside the model
_CHUNK_ELEMENTS = 32 * 2**20
# of these, how many are turned into probabilities at a time on a CPU
_SLAB_ELEMENTS = 2**18
_NO_LABEL = -1


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    accumulate_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) of softmax(hidden @ weight^T) at the labels, summed.

    Chunk by chunk the logits are formed, reduced in fp32 and turned into their gradient, which is multiplied
    out at once; the backward pass only scales. Rows whose label is ignored cost nothing.

    Args:
        hidden_TD, weight_VD: of one dtype; logits are rounded to it, as a linear layer's are.
        labels_T: int64 in [0, V) or ignore_index.
        chunk_tokens: tokens per chunk; None: as many as make 32 Mi logits.
        accumulate_dtype: in which the weight's gradient is summed over chunks (fp64 weights: fp64).

    Returns: (summed loss, a scalar in fp32 (fp64 for fp64), number of targets, a scalar int64).
    """
    weight_VD = weight_VD if torch.is_grad_enabled() else weight_VD.detach()
    hidden_TD = hidden_TD if torch.is_grad_enabled() else hidden_TD.detach()
    targets = labels_T != ignore_index
    num_targets = targets.sum()
    if liger.enabled and liger.use("cross_entropy", hidden_TD, weight_VD):
        return liger.linear_cross_entropy(hidden_TD, weight_VD, labels_T, ignore_index), num_targets
    # On a GPU nothing waits for their number: rows without a target go through the head, and count for nothing.
    kept = _kept_rows(targets, int(num_targets), hidden_TD) if hidden_TD.device.type == "cpu" else None
    if kept is not None:
        hidden_TD, labels_T = hidden_TD[kept], labels_T[kept]
    labels_T = labels_T.masked_fill(labels_T == ignore_index, _NO_LABEL)
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_ELEMENTS // len(weight_VD))
    accumulate_dtype = torch.promote_types(accumulate_dtype, weight_VD.dtype)
    loss = _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, chunk_tokens, accumulate_dtype)
    return loss, num_targets


def token_losses(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, ignore_index: int = -100) -> Tensor:
    """The same of each token, (T,), 0 where the label is ignored, with gradient. No more than a chunk's logits exist at
    once: the backward pass forms them again."""
    chunk_tokens = max(1, _CHUNK_ELEMENTS // len(weight_VD))

    def of_chunk(hidden_CD: Tensor, labels_C: Tensor) -> Tensor:
        logits_CV = F.linear(hidden_CD, weight_VD)
        wide = torch.promote_types(logits_CV.dtype, torch.float32)
        return F.cross_entropy(logits_CV.to(wide), labels_C, ignore_index=ignore_index, reduction="none")

    parts = zip(hidden_TD.split(chunk_tokens), labels_T.split(chunk_tokens))
    return torch.cat([checkpoint(of_chunk, *part, use_reentrant=False) for part in parts])


def _kept_rows(targets_T: Tensor, num_targets: int, hidden_TD: Tensor) -> Tensor | None:
    """Which rows to go through: those with a target, and as many more as make their number round where a product is
    compiled for each new number of rows. None: all of them."""
    count = num_targets
    if compiled_by_shape(hidden_TD):
        count = min(round_up(num_targets), len(targets_T))
    if count == len(targets_T):
        return None
    if count == num_targets:
        return targets_T.nonzero()[:, 0]
    return targets_T.byte().argsort(stable=True, descending=True)[:count]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, labels_T, chunk_tokens, accumulate_dtype):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden_TD.device)
        grad_hidden = torch.empty_like(hidden_TD) if needs_hidden else None
        single = len(hidden_TD) <= chunk_tokens and len(hidden_TD) > 0
        grad_weight = None
        if needs_weight and single:  # no sum to be kept in a wider dtype
            grad_weight = torch.empty_like(weight_VD)
        elif needs_weight:
            grad_weight = torch.zeros_like(weight_VD, dtype=accumulate_dtype)
        for start in range(0, len(hidden_TD), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            hidden_CD = hidden_TD[rows]
            logits_CV = mm(hidden_CD, weight_VD.t())
            loss += _loss_and_gradient_(logits_CV, labels_T[rows], needs_hidden or needs_weight)
            grad_CV = logits_CV  # by now, if one is needed
            if needs_hidden:
                mm(grad_CV, weight_VD, out=grad_hidden[rows])
            if needs_weight and single:
                mm(grad_CV.t(), hidden_CD, out=grad_weight)
            elif needs_weight and accumulate_dtype == hidden_TD.dtype:
                mm(grad_CV.t(), hidden_CD, out=grad_weight, add=True)
            elif needs_weight:
                grad_weight += mm(grad_CV.t(), hidden_CD)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad).to(grad_hidden.dtype)
        if grad_weight is not None and grad_weight.dtype == ctx.weight_dtype and not graph_is_kept():
            grad_weight.mul_(grad)
        elif grad_weight is not None:
            scaled = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(grad_weight, grad, out=scaled)
        return grad_hidden, grad_weight, None, None, None


def _loss_and_gradient_(logits_CV: Tensor, labels_C: Tensor, needs_gradient: bool) -> Tensor:
    """The rows' summed loss; the logits are overwritten with its gradient, softmax minus one at the label, and zero
    in rows without one.

    Without the kernel: in slabs that stay in cache on a CPU. The log of the normaliser comes from the largest
    probability, which is never below 1/V, so that one pass of exponentials serves both results.
    """
    if native.fits(logits_CV) and logits_CV.is_contiguous():
        loss_C, labels_C = torch.empty(len(labels_C)), labels_C.contiguous()
        native.call("cross_entropy", logits_CV.dtype, logits_CV, labels_C, loss_C, *logits_CV.shape, needs_gradient)
        return loss_C.sum()
    rows = max(1, _SLAB_ELEMENTS // logits_CV.shape[1]) if logits_CV.device.type == "cpu" else len(logits_CV)
    slabs = zip(logits_CV.split(rows), labels_C.split(rows), strict=True)
    return torch.stack([_slab_loss_(logits_cV, label_c, needs_gradient) for logits_cV, label_c in slabs]).sum()


@region
def _slab_loss_(logits_cV: Tensor, label_c: Tensor, needs_gradient: bool) -> Tensor:
    wide = torch.promote_types(logits_cV.dtype, torch.float32)
    ignored_c1 = label_c[:, None] == _NO_LABEL
    label_c1 = label_c[:, None].clamp(min=0)
    probability_cV = logits_cV.softmax(1, dtype=wide)
    log_sum_c1 = logits_cV.amax(1, keepdim=True) - probability_cV.amax(1, keepdim=True).log()
    loss = (log_sum_c1 - logits_cV.gather(1, label_c1)).masked_fill(ignored_c1, 0).sum()
    if needs_gradient:
        probability_cV.scatter_add_(1, label_c1, probability_cV.new_full((1, 1), -1).expand_as(label_c1))
        logits_cV.copy_(probability_cV.masked_fill_(ignored_c1, 0))
    return loss

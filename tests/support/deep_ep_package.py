"""A package with the signatures of deep_ep (its `Buffer`, as of version 1.1) whose kernels are torch's all-to-all."""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Buffer:
    calls: ClassVar[list[str]] = []

    def __init__(
        self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0, low_latency_mode=False
    ):
        assert num_nvl_bytes > 0
        self.group, self.rank, self.group_size = group, group.rank(), group.size()

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ) -> tuple:
        assert topk_idx.dtype == torch.int64
        held = num_experts // self.group_size
        goes = torch.stack([(topk_idx // held == rank).any(1) for rank in range(self.group_size)], 1)
        counts = torch.bincount(topk_idx.flatten(), minlength=num_experts)
        return goes.sum(0).int(), None, counts.int(), goes, None

    def dispatch(
        self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
        num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1, config=None,
        previous_event=None, async_finish=False, allocate_on_comm_stream=False,
    ) -> tuple:  # fmt: skip
        self.calls.append("dispatch")
        assert x.is_contiguous()
        if handle is not None:
            assert topk_idx is None and topk_weights is None  # noqa: PT018 (as the package does)
            goes, sent, received = handle
            return self._to_ranks(x, goes, sent, received), None, None, None, None, None
        assert topk_weights.dtype == torch.float32
        sent = is_token_in_rank.sum(0).tolist()
        received_R = torch.empty(self.group_size, dtype=torch.int64)
        dist.all_to_all_single(received_R, torch.tensor(sent), group=self.group)
        received, goes = received_R.tolist(), is_token_in_rank
        idx, weights = (self._to_ranks(t, goes, sent, received) for t in (topk_idx, topk_weights))
        held = len(num_tokens_per_expert) // self.group_size
        here = idx // held == self.rank
        idx = torch.where(here, idx - self.rank * held, -1)
        counts = torch.bincount(idx[here], minlength=held).tolist()
        handle = goes, sent, received
        return self._to_ranks(x, goes, sent, received), idx, torch.where(here, weights, 0.0), counts, handle, None

    def combine(
        self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None, async_finish=False,
        allocate_on_comm_stream=False,
    ) -> tuple:  # fmt: skip
        self.calls.append("combine")
        assert x.is_contiguous()
        goes, sent, received = handle
        weights = None if topk_weights is None else self._from_ranks(topk_weights, goes, sent, received)
        return self._from_ranks(x, goes, sent, received), weights, None

    def _to_ranks(self, x: Tensor, goes: Tensor, sent: list, received: list) -> Tensor:
        rows = torch.cat([x[goes[:, rank]] for rank in range(self.group_size)])
        arrived = rows.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(arrived, rows, received, sent, group=self.group)
        return arrived

    def _from_ranks(self, x: Tensor, goes: Tensor, sent: list, received: list) -> Any:
        rows = x.new_empty(sum(sent), *x.shape[1:])
        dist.all_to_all_single(rows, x, sent, received, group=self.group)
        total = x.new_zeros(len(goes), *x.shape[1:])
        for rank, part in enumerate(rows.split(sent)):
            total[goes[:, rank]] += part
        return total

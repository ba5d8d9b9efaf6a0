"""A stand-in for DeepSpeed's ZeRO in rehearsals: who holds what, and what is exchanged when.

DeepSpeed asks the device itself for much that tensors without values cannot answer. This does what the stages say
(Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5) and what
`engine_config` sets: gradients are summed in fp32, a parameter's gradient is reduced by itself, and the optimizer holds fp32
masters and two moments. DeepSpeed's own buckets and prefetching are not in it: they hold up to some hundreds of MB more.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_llm.distributed.rehearsal.record import Recorder
from moe_llm.model.decoder import DecoderLayer, MoEDecoder
from moe_llm.ops import host


class ShardedAdamW:
    """AdamW over the shards of one rank.

    Args:
        expert_parameters: those that only `expert_group` shares, instead of all ranks.
        stage: 1: masters and moments are sharded; 2: gradients too; 3: weights too, but for small ones.
    """

    def __init__(
        self,
        model: MoEDecoder,
        recorder: Recorder,
        stage: int,
        dense_group: dist.ProcessGroup,
        expert_group: dist.ProcessGroup,
        expert_parameters: set[str],
        persistent: int = 100_000,
    ):
        self.recorder, self.stage = recorder, stage
        self._group: dict[nn.Parameter, dist.ProcessGroup] = {}
        self._shapes = {p: p.shape for p in model.parameters()}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        self._weights: dict[nn.Parameter, Tensor] = {}
        recorder.kind = "optimizer"
        for name, p in model.named_parameters():
            self._group[p] = expert_group if name in expert_parameters else dense_group
            self._masters[p] = nn.Parameter(torch.zeros(self._share(p), device=p.device, dtype=torch.float32))
            p.register_post_accumulate_grad_hook(self._take_gradient)
        self._adamw = torch.optim.AdamW(list(self._masters.values()), foreach=True)
        for master in self._masters.values():  # as after the first step
            state = self._adamw.state[master]
            state["step"] = torch.ones(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        self._spread = {p for p in model.parameters() if stage == 3 and p.numel() > persistent}
        recorder.kind = "weights"
        for p in self._spread:
            self._weights[p] = torch.empty(self._share(p), device=p.device, dtype=p.dtype)
        self._release(self._spread)
        if stage == 3:
            self._gather_for(model)

    def _share(self, p: nn.Parameter) -> int:
        return -(-self._shapes[p].numel() // dist.get_world_size(self._group[p]))

    # stage 3

    def _gather_for(self, model: MoEDecoder) -> None:
        self.in_backward = False
        units: list[nn.Module] = [m for m in model.modules() if isinstance(m, DecoderLayer)]
        for unit in [*units, model.model.embed_tokens, model.lm_head]:
            own = [p for p in unit.parameters() if p in self._spread]
            unit.register_forward_pre_hook(self._gathering(own))
            unit.register_forward_hook(self._releasing(own))
            unit.register_full_backward_pre_hook(self._gathering(own))

    def _gathering(self, own: list[nn.Parameter]) -> Callable:
        return lambda *_: self._gather(own)

    def _releasing(self, own: list[nn.Parameter]) -> Callable:
        # what the backward pass has gathered stays until its gradient is there
        return lambda *_: None if self.in_backward else self._release(own)

    def _gather(self, own: list[nn.Parameter]) -> None:
        before, self.recorder.kind = self.recorder.kind, "gathered weights"
        for p in own:
            if p.numel() == 0:
                shard = self._weights[p]
                whole = shard.new_empty(shard.numel() * dist.get_world_size(self._group[p]))
                dist.all_gather_into_tensor(whole, shard, group=self._group[p])
                p.data = whole[: self._shapes[p].numel()].view(self._shapes[p])
        self.recorder.kind = before

    def _release(self, own: list[nn.Parameter] | set[nn.Parameter]) -> None:
        for p in own:
            p.data = torch.empty(0, device=p.device, dtype=p.dtype)

    # gradients

    def _take_gradient(self, p: Tensor) -> None:
        assert isinstance(p, nn.Parameter)
        before, self.recorder.kind = self.recorder.kind, "gradients"
        assert p.grad is not None
        gradient, p.grad = p.grad.float(), None
        if self.stage > 1:
            gradient = self._reduced(p, gradient)
            if not self._gradients:  # DeepSpeed has one buffer for all of them
                self._gradients = {
                    q: torch.zeros(self._share(q), device=q.device) for q in self._masters if q.requires_grad
                }
        held = self._gradients.get(p)
        self._gradients[p] = gradient if held is None else held.add_(gradient)
        if p in self._spread:
            self._release([p])
        self.recorder.kind = before

    def _reduced(self, p: nn.Parameter, gradient: Tensor) -> Tensor:
        group, share = self._group[p], self._share(p)
        size = dist.get_world_size(group)
        flat = torch.nn.functional.pad(gradient.flatten(), (0, share * size - gradient.numel()))
        reduced = flat.new_empty(share)
        dist.reduce_scatter_tensor(reduced, flat, group=group)
        return reduced

    @torch.no_grad()
    def step(self) -> None:
        """Reduce what is not reduced yet, clip by the global norm, update, and give every rank the new weights."""
        self.recorder.kind = "optimizer step"
        for p, master in self._masters.items():
            gradient = self._gradients.pop(p)
            master.grad = self._reduced(p, gradient) if self.stage == 1 else gradient
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        total = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        dist.all_reduce(total)
        host.read(total, "the gradients' norm")
        for gradient in gradients:
            gradient.mul_(total.rsqrt())
        self._adamw.step()
        for p, master in self._masters.items():
            shard = master.detach().to(p.dtype)
            master.grad = None
            if p in self._spread:
                self._weights[p].copy_(shard)
                continue
            whole = shard.new_empty(shard.numel() * dist.get_world_size(self._group[p]))
            dist.all_gather_into_tensor(whole, shard, group=self._group[p])
            p.copy_(whole[: p.numel()].view_as(p))

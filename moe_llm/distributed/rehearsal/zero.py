"""A stand-in for DeepSpeed's ZeRO in rehearsals: who holds what, and what is exchanged when.

DeepSpeed asks the device itself for much that tensors without values cannot answer. This does what the stages say
(Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5) in the way in
which DeepSpeed 0.19 does it with what `engine_config` sets: gradients wait in a bucket until it is full, are copied and
widened to be reduced, and are summed in fp32 (or `parallel.gradient_dtype`); the optimizer updates fp32 masters (or what
`optim.master_weights` puts in their place) and two moments, group by group. Fetching
ahead of time is not in it.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_llm.config import Config
from moe_llm.distributed.adamw_8bit import BLOCK
from moe_llm.distributed.rehearsal.record import Recorder
from moe_llm.model.decoder import DecoderLayer, MoEDecoder
from moe_llm.ops import host

_SUB_GROUP = 1_000_000_000  # DeepSpeed's sub_group_size: elements that ZeRO-3 updates at once
_MAX_LIVE = 1_000_000_000  # its stage3_max_live_parameters: elements that it leaves gathered
_PERSISTENT = 100_000  # elements below which ZeRO-3 leaves a parameter whole


class ShardedAdamW:
    """AdamW over the shards of one rank.

    Args:
        expert_parameters: those that only `expert_group` shares, instead of all ranks.
    """

    def __init__(
        self,
        model: MoEDecoder,
        recorder: Recorder,
        config: Config,
        dense_group: dist.ProcessGroup,
        expert_group: dist.ProcessGroup,
        expert_parameters: set[str],
    ):
        self.recorder, self.stage = recorder, config.parallel.zero_stage
        self.sums = torch.bfloat16 if config.parallel.gradient_dtype == "bf16" else torch.float32
        self.sent = torch.bfloat16 if config.parallel.communication_dtype == "bf16" else torch.float32
        self.narrow = config.optim.master_weights != "fp32"
        # DeepSpeed's BF16_Optimizer holds whole gradients in fp32 and reduces them at the end
        self.whole_sums = self.stage == 1 and self.sums == torch.float32
        self._group: dict[nn.Parameter, dist.ProcessGroup] = {}
        self._shapes = {p: p.shape for p in model.parameters()}
        self._expert = {p for name, p in model.named_parameters() if name in expert_parameters}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        self._weights: dict[nn.Parameter, Tensor] = {}
        self._in_bucket: list[tuple[nn.Parameter, Tensor]] = []
        self._filled = 0
        recorder.kind = "optimizer"
        compensations = []
        for name, p in model.named_parameters():
            self._group[p] = expert_group if name in expert_parameters else dense_group
            master = torch.empty(0) if self.narrow else torch.zeros(self._share(p), device=p.device)
            self._masters[p] = nn.Parameter(master)
            if config.optim.master_weights == "kahan":
                compensations.append(torch.zeros(self._share(p), device=p.device, dtype=torch.bfloat16))
            p.register_post_accumulate_grad_hook(self._take_gradient)
        self._kept = compensations
        packs = config.optim.name == "adamw_8bit"
        self._moments = {
            p: self._new_moments(p, packed=packs and p.dim() > 1 and "embed_tokens" not in name)
            for name, p in model.named_parameters()
        }
        recorder.kind = "gradients"
        self._set_up_sums(config)
        self._spread = {p for p in model.parameters() if self.stage == 3 and p.numel() > _PERSISTENT}
        recorder.kind = "weights"
        for p in self._spread:
            self._weights[p] = torch.empty(self._share(p), device=p.device, dtype=p.dtype)
        self._release(self._spread)
        if self.stage == 3:
            self._gather_for(model)

    def _new_moments(self, p: nn.Parameter, packed: bool) -> list[Tensor]:
        """fp32, or codes with the maximum of each block behind them: those are updated in place, too."""
        share = self._share(p)
        if packed:
            return [torch.zeros(share + 4 * -(-share // BLOCK), device=p.device, dtype=torch.uint8) for _ in range(2)]
        return [torch.zeros(share, device=p.device) for _ in range(2)]

    def _set_up_sums(self, config: Config) -> None:
        """What DeepSpeed holds from the start: sums of whole gradients, or the bucket, in ZeRO-3 with all sums."""
        self.bucket = config.reduce_bucket_size
        if self.whole_sums:
            for p, shape in self._shapes.items():
                self._gradients[p] = torch.zeros(shape, device=p.device)
            return
        if self.stage == 3:
            self._make_sums()
        dtype = self.sent if self.stage == 3 else torch.bfloat16
        # the next one is filled while one is reduced
        overlaps = self.stage == 2 and config.parallel.overlap_comm in ("auto", True)
        self._buckets = [torch.empty(self.bucket, device="cuda", dtype=dtype) for _ in range(2 if overlaps else 1)]

    def _make_sums(self) -> None:
        for q in self._masters:
            if q.requires_grad and q not in self._gradients:
                self._gradients[q] = torch.zeros(self._share(q), device=q.device, dtype=self.sums)

    def _share(self, p: nn.Parameter) -> int:
        return -(-self._shapes[p].numel() // dist.get_world_size(self._group[p]))

    # stage 3

    def _gather_for(self, model: MoEDecoder) -> None:
        self._live: dict[nn.Parameter, None] = {}  # gathered, the least recently used first
        units: list[nn.Module] = [m for m in model.modules() if isinstance(m, DecoderLayer)]
        for unit in [*units, model.model.embed_tokens, model.lm_head]:
            own = [p for p in unit.parameters() if p in self._spread]
            unit.register_forward_pre_hook(self._gathering(own))
            unit.register_full_backward_pre_hook(self._gathering(own))

    def _gathering(self, own: list[nn.Parameter]) -> Callable:
        return lambda *_: self._gather(own)

    def _gather(self, own: list[nn.Parameter]) -> None:
        """What a layer needs is whole; what other layers have left behind is too, as far as `_MAX_LIVE` allows."""
        for p in own:
            self._live.pop(p, None)
        room = _MAX_LIVE - sum(self._shapes[p].numel() for p in own)
        for p in [*self._live]:
            if sum(self._shapes[q].numel() for q in self._live) <= room:
                break
            self._release([p])
            del self._live[p]
        before, self.recorder.kind = self.recorder.kind, "gathered weights"
        for p in own:
            self._live[p] = None
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
        assert p.grad is not None
        with self.recorder.during("gradients", "gradients"):
            if self.whole_sums:
                self._gradients[p].add_(p.grad.to(torch.float32))
                p.grad = None
            elif self.stage > 1:  # else they are summed as parameters' own gradients, and reduced in the step
                self._into_bucket(p, p.grad)
                p.grad = None

    def _into_bucket(self, p: nn.Parameter, gradient: Tensor) -> None:
        experts = bool(self._in_bucket) and (self._in_bucket[0][0] in self._expert) != (p in self._expert)
        if self._filled + gradient.numel() > self.bucket or (self.stage == 3 and experts):
            self.flush()
        if gradient.numel() <= self.bucket:  # larger ones wait as they are
            room = self._buckets[0][self._filled : self._filled + gradient.numel()]
            gradient = room.copy_(gradient.flatten())
        self._in_bucket.append((p, gradient))
        self._filled += gradient.numel()

    def flush(self) -> None:
        """Reduce what has gathered, and sum what is this rank's."""
        before, self.recorder.kind = self.recorder.kind, "gradients"
        waiting, self._in_bucket, self._filled = self._in_bucket, [], 0
        for group in dict.fromkeys(self._group[p] for p, _ in waiting):
            own = [(p, gradient.flatten()) for p, gradient in waiting if self._group[p] is group]
            if self.stage == 3:
                self._scatter(own, group)
            else:
                self._reduce(own, group)
        if waiting and self.stage < 3:
            self._buckets.reverse()
        self.recorder.kind = before

    def _scatter(self, own: list[tuple[nn.Parameter, Tensor]], group: dist.ProcessGroup) -> None:
        """DeepSpeed's reduce_scatter_coalesced: as wide as they are sent, and of several tensors a copy by ranks."""
        size = dist.get_world_size(group)
        wide = [gradient.to(self.sent) for _, gradient in own]
        even = len(wide) == 1 and wide[0].numel() % size == 0
        flat = wide[0] if even else torch.cat([nn.functional.pad(g, (0, -g.numel() % size)) for g in wide])
        flat.div_(size)
        reduced = flat.view(size, -1)[dist.get_rank(group)] if even else flat.new_empty(flat.numel() // size)
        dist.reduce_scatter_tensor(reduced, flat, group=group)
        for (p, _), piece in zip(own, reduced.split([self._share(p) for p, _ in own])):
            self._gradients[p].add_(piece)

    def _reduce(self, own: list[tuple[nn.Parameter, Tensor]], group: dist.ProcessGroup) -> None:
        """DeepSpeed's allreduce_bucket: slices by rank are copied together, up to a bucket and one more, and widened."""
        self._make_sums()
        size, total = dist.get_world_size(group), sum(gradient.numel() for _, gradient in own)
        slices = [piece for _, gradient in own for piece in gradient.split(-(-gradient.numel() // size))]
        at_once: list[Tensor] = []
        for i, piece in enumerate(slices):
            at_once.append(piece)
            if sum(t.numel() for t in at_once) > self.bucket or i + 1 == len(slices):
                flat = torch.cat(at_once) if len(at_once) > 1 else at_once[0]
                wide = flat.to(self.sent)
                dist.all_reduce(wide, group=group)
                del flat, wide
                at_once = []
        assert total, "an empty bucket is not reduced"
        for p, gradient in own:
            self._gradients[p].add_(gradient[: self._gradients[p].numel()])

    def gradient_square(self) -> Tensor:
        """This rank's summand of the square of the gradients' norm, as far as they are reduced."""
        self.flush()
        held = [self._own_share(p) for p in self._gradients]
        return torch.stack([torch.linalg.vector_norm(share, dtype=torch.float32) for share in held]).square().sum()

    # the step

    @torch.no_grad()
    def step(self) -> None:
        """Reduce what is not reduced yet, clip by the global norm, update, and give every rank the new weights."""
        self.recorder.kind = "optimizer step"
        if self.whole_sums:
            self._reduce_whole()
        else:
            self._end_buckets()
        if self.stage == 3:  # nothing stays gathered
            self._release(self._spread)
            self._live.clear()
        shares = [self._own_share(p) for p in self._masters]
        total = torch.stack([torch.linalg.vector_norm(share, dtype=torch.float32) for share in shares]).square().sum()
        dist.all_reduce(total)
        host.read(total, "the gradients' norm")
        for parameters in self._step_groups():
            self._update(parameters, total)
        if self.whole_sums:
            for gradient in self._gradients.values():
                gradient.zero_()
        elif self.stage < 3:
            self._gradients = {}
        self._publish()

    def _end_buckets(self) -> None:
        if self.stage == 1:
            for p in self._masters:
                gradient, p.grad = p.grad, None
                assert gradient is not None
                self._into_bucket(p, gradient)
        self.flush()

    def _reduce_whole(self) -> None:
        """DeepSpeed's buffered_allreduce_fallback: copies of a bucket and one tensor more."""
        for group in dict.fromkeys(self._group[p] for p in self._masters):
            at_once: list[Tensor] = []
            own = [self._gradients[p] for p in self._masters if self._group[p] is group]
            for i, gradient in enumerate(own):
                at_once.append(gradient)
                if sum(t.numel() for t in at_once) > self.bucket or i + 1 == len(own):
                    flat = torch.cat([t.flatten() for t in at_once])
                    dist.all_reduce(flat, group=group)
                    for t, reduced in zip(at_once, flat.split([t.numel() for t in at_once])):
                        t.copy_(reduced.view_as(t))
                    del flat, reduced
                    at_once = []

    def _own_share(self, p: nn.Parameter) -> Tensor:
        gradient = self._gradients[p]
        return gradient.flatten()[: self._share(p)] if self.whole_sums else gradient

    def _step_groups(self) -> list[list[nn.Parameter]]:
        """Parameters that are updated together: dense matrices, vectors and experts; in ZeRO-3 up to `_SUB_GROUP`."""
        kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for p, shape in self._shapes.items():
            kinds.setdefault((p in self._expert, len(shape) > 1), []).append(p)
        if self.stage < 3:
            return list(kinds.values())
        groups = []
        for own in kinds.values():
            groups.append([own[0]])
            for p in own[1:]:
                if sum(self._share(q) for q in groups[-1]) + self._share(p) > _SUB_GROUP:
                    groups.append([])
                groups[-1].append(p)
        return groups

    def _update(self, group: list[nn.Parameter], total: Tensor) -> None:
        shares = [self._own_share(p) for p in group]
        if not self.whole_sums:
            flat = torch.cat(shares)
            wide = flat if self.narrow else flat.to(torch.float32)
            shares = list(wide.split([share.numel() for share in shares]))
            del flat
            if self.stage < 3:
                for p in group:
                    del self._gradients[p]
        for p, share in zip(group, shares):
            share.mul_(total.rsqrt())
            master, (first, second) = self._masters[p].data, self._moments[p]
            weight = torch.zeros_like(share[: 2**22], dtype=torch.float32) if self.narrow else master
            for target in (moment for moment in (first, second, weight) if moment.dtype != torch.uint8):
                target.mul_(0.9).add_(share[: target.numel()])

    def _publish(self) -> None:
        """The updated shards into the weights, in place, and from all ranks."""
        for p, master in self._masters.items():
            if p in self._spread:
                self._weights[p].copy_(self._weights[p] if self.narrow else master.data)
                continue
            whole, share = p.data.flatten(), self._share(p)
            if not self.narrow:
                own = whole[:share]
                own.copy_(master.data[: own.numel()])
            if whole.numel() % share == 0 and whole.numel() == share * dist.get_world_size(self._group[p]):
                dist.all_gather_into_tensor(whole, whole[:share], group=self._group[p])
            else:  # a small one, with padding
                padded = whole.new_empty(share * dist.get_world_size(self._group[p]))
                dist.all_gather_into_tensor(padded, padded[:share].clone(), group=self._group[p])
                whole.copy_(padded[: whole.numel()])

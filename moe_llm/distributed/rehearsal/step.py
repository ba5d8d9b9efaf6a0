"""One whole training step of one rank of a cluster, rehearsed on a CPU: forward, backward, optimizer, at true sizes.

Everything of ours that a GPU would run is run: model, routers, dispatcher, kernels' wrappers, step loss. Not rehearsed are
DeepSpeed (`zero.ShardedAdamW` stands in for it), the kernels themselves, and the training loop around the step.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from moe_llm.config import Config
from moe_llm.data.packing import Batch, model_inputs
from moe_llm.distributed.dispatch import AllToAllDispatcher
from moe_llm.distributed.engine import first_experts, save_memory, shard_experts
from moe_llm.distributed.rehearsal.device import TimingEvent, cuda_without_values
from moe_llm.distributed.rehearsal.record import Exchange, Memory, Recorder, Values, Wait
from moe_llm.distributed.rehearsal.zero import ShardedAdamW
from moe_llm.distributed.runtime import Runtime
from moe_llm.distributed.sequence import share_sequences
from moe_llm.distributed.step_loss import StepLoss
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.moe.experts import MoELayer
from moe_llm.model.moe.router import begin_step, end_step
from moe_llm.ops import host

Drive = Callable[[Config, MoEDecoder, ShardedAdamW, Runtime, Recorder, list[Batch]], None]
PHASES = ("forward", "backward", "optimizer")
# Products of fp32 in a step of bf16: routers' logits are, at most 1.3% of all (soft slots, as many as tokens).
FP32_PRODUCTS = 0.02


@dataclass
class Rehearsal:
    """What one rank's step did. Counters are by phase: forward, backward (with recomputation), optimizer."""

    layers: int
    operations: Counter[str]
    bytes: Counter[str]
    names: dict[str, Counter[str]]
    waits: list[Wait]
    uploads: list[Wait]
    exchanges: list[Exchange]
    memory: Memory
    timing_events: int
    faults: list[str] = field(default_factory=list)

    def waits_named(self) -> Counter[str]:
        """How often the host waits for what, outside of the optimizer."""
        return Counter(wait.what for wait in self.waits if wait.phase != "optimizer")


def rehearse(
    config: Config,
    world_size: int,
    *,
    rank: int = 0,
    capability: tuple[int, int] = (9, 0),
    micro_batches: int = 1,
    runs: Sequence[Sequence[int]] | None = None,
    skew: float = 0.0,
    before_step: Callable[[MoEDecoder], None] = lambda model: None,
    drive: "Drive | None" = None,
) -> Rehearsal:
    """One optimizer step of `rank` among `world_size` GPUs.

    Args:
        config: of the run; its micro-batch and sequence length, precision bf16, EP size, ZeRO stage, checkpointing.
        capability: the GPUs' compute capability.
        runs: of each sequence the lengths of its documents; None: a document each.
        skew: see `Values`.
        before_step: is given the model, for instance to plant a fault.
        drive: takes the step; None: passes, loss and optimizer alone. `train.rehearsal` has the training loop.
    """
    with cuda_without_values(capability), _ranks(rank, world_size), warnings.catch_warnings():
        # torch 2.13 renames what torch 2.11 knows by these names alone
        warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
        recorder = Recorder()
        places = config.train.micro_batch_size * config.data.sequence_length // config.parallel.sequence_parallel_size
        tokens = places * config.model.num_experts_per_tok
        values = Values(rank, world_size, tokens, skew)
        with recorder, recorder.exchanging(), host.reading_with(lambda *asked: recorder.read(values, *asked)):
            model, optimizer = _build(config, world_size, rank, recorder)
            runtime = Runtime(None, torch.device("cuda"), rank, world_size, deepspeed=True)
            before_step(model)
            recorder.start_measuring()
            recorder.phase, recorder.kind = "batch", "batch"
            batches = [_batch(config, runs) for _ in range(micro_batches)]
            (drive or _take_step)(config, model, optimizer, runtime, recorder, batches)
    faults = recorder.faults + _slips(recorder)
    return Rehearsal(
        config.model.num_hidden_layers,
        recorder.operations,
        recorder.bytes,
        recorder.names,
        [wait for wait in recorder.waits if wait.phase != "build"],
        [upload for upload in recorder.uploads if upload.phase != "build"],
        [exchange for exchange in recorder.exchanges if exchange.phase != "build"],
        recorder.memory,
        TimingEvent.made,
        faults,
    )


def disagreements(of_ranks: Sequence[Rehearsal], ranks: Sequence[int]) -> list[str]:
    """Where the exchanges of ranks do not fit together: another order, another dtype, or one sends what the other does not
    expect. Such ranks would wait for each other for ever, or read what is not theirs."""
    found = []
    for i, a in enumerate(of_ranks):
        for j in range(i + 1, len(of_ranks)):
            ours, theirs = ranks[i], ranks[j]
            shared = [[e for e in one.exchanges if ours in e.ranks and theirs in e.ranks] for one in (a, of_ranks[j])]
            if len(shared[0]) != len(shared[1]):
                found.append(
                    f"rank {ours} makes {len(shared[0])} exchanges with rank {theirs}, which makes {len(shared[1])}"
                )
            for number, (x, y) in enumerate(zip(*shared)):
                why = _mismatch(x, y, ours, theirs)
                if why:
                    found.append(f"exchange {number} of ranks {ours} and {theirs}, {x.name} in {x.phase}: {why}")
                    break
    return found


def _mismatch(x: Exchange, y: Exchange, ours: int, theirs: int) -> str | None:
    if (x.name, x.ranks, x.dtype) != (y.name, y.ranks, y.dtype):
        return f"the other one makes {y.name} of {y.dtype} with {len(y.ranks)} ranks"
    if x.name != "all_to_all_single":
        return None if x.elements == y.elements else f"{x.elements} elements meet {y.elements}"
    at, there = x.ranks.index(ours), x.ranks.index(theirs)
    if len(x.sent) != len(x.ranks):  # equal parts
        return None if x.elements == y.elements else f"{x.elements} elements meet {y.elements}"
    if x.sent[there] != y.received[at] or y.sent[at] != x.received[there]:
        return f"{x.sent[there]} rows are sent where {y.received[at]} are expected"
    return None


@contextmanager
def _ranks(rank: int, world_size: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a rehearsal needs a process that is in no group"
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _build(config: Config, world_size: int, rank: int, recorder: Recorder) -> tuple[MoEDecoder, ShardedAdamW]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # tensors without values are not converted: they are built in it
    try:
        with torch.device("cuda"):
            model = MoEDecoder(config.model)
    finally:
        torch.set_default_dtype(usual)
    ep = config.parallel.expert_parallel_size
    shard_experts(model, config.expert_range(rank))
    first = rank // ep * ep
    neighbours = dist.new_group(list(range(first, first + ep)))
    replicas = dist.new_group(list(range(rank % ep, world_size, ep)))
    chunks = config.parallel.all_to_all_chunks
    for layer in model.modules():
        if isinstance(layer, MoELayer) and ep > 1:
            layer.dispatcher = AllToAllDispatcher(neighbours, ep, 2 if chunks == "auto" else chunks)
    share_sequences(model, config.parallel.sequence_parallel_size, rank, world_size)
    save_memory(model, config)
    everyone = dist.group.WORLD
    assert everyone is not None
    experts = set(first_experts(model))
    optimizer = ShardedAdamW(model, recorder, config, everyone, replicas, experts)
    return model.train(), optimizer


def _batch(config: Config, runs: Sequence[Sequence[int]] | None) -> Batch:
    micro, length, parts = (
        config.train.micro_batch_size,
        config.data.sequence_length,
        config.parallel.sequence_parallel_size,
    )
    shape = micro, length // parts
    ids, positions, labels, documents = (torch.zeros(shape, dtype=torch.int64, device="cuda") for _ in range(4))
    known = runs if runs is not None else [[length]] * micro
    return Batch(
        ids,
        labels,
        positions,
        documents,
        torch.ones(shape, dtype=torch.bool, device="cuda"),
        runs_B=tuple(tuple(row) for row in known),
    )


def _take_step(
    config: Config,
    model: MoEDecoder,
    optimizer: ShardedAdamW,
    runtime: Runtime,
    recorder: Recorder,
    batches: list[Batch],
) -> None:
    begin_step(model, 0)
    step_loss = StepLoss(config.model, runtime, batches)
    for batch in batches:
        with recorder.during("forward", "activations"):
            losses = step_loss(model(**model_inputs(batch)))
        with recorder.during("backward", "backward"):
            losses.total.backward()
        del losses
    with recorder.during("optimizer", "optimizer step"):
        optimizer.step()
        end_step(model, step_loss.step_routing)


def _slips(recorder: Recorder) -> list[str]:
    flops: Any = recorder.product_flops
    share = flops[torch.float32] / max(sum(flops.values()), 1)
    return [f"{share:.1%} of the products are of fp32, in a step of bf16"] if share > FP32_PRODUCTS else []

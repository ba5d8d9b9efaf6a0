"""The processes of a run: who am I, on which device, and the few exchanges of small values that training needs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_llm.config import Config
from moe_llm.distributed import deep_ep
from moe_llm.locks import tell
from moe_llm.ops import host_memory, kernels


@dataclass(frozen=True)
class Runtime:
    """accelerator: accelerate's, with DeepSpeed engaged if `deepspeed`; device: where this rank computes;
    sequence_parallel: neighbouring ranks that share the blocks that they read, and each block among them."""

    accelerator: Any
    device: torch.device
    rank: int
    world_size: int
    deepspeed: bool
    sequence_parallel: int = 1

    @property
    def reads(self) -> dict[str, Any]:
        """What of the data this rank reads, as arguments of loaders."""
        size = self.sequence_parallel
        return {"rank": self.rank // size, "world_size": self.world_size // size, "part": (self.rank % size, size)}

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            tell("waiting for the other ranks")
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place where there are several."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> Sequence[Any]:
        """The Python objects of all ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        tell("waiting for the other ranks")
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())

    def close(self) -> None:
        """Leave the group, and return what memory was kept for the next step; this process can then load models on
        its own, or join another group."""
        host_memory.trim()
        if self.deepspeed:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            # Otherwise transformers would load every model together with all ranks, as ZeRO-3 asks it to.
            unset_hf_deepspeed_config()
        if self.deepspeed or self.world_size > 1:
            from moe_llm.distributed.deepspeed import leave_group

            leave_group()
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)  # it would take the group for one that is there
        GradientState._reset_state()


def world_size_from_environment() -> int:
    """Ranks that the launcher started; known before any process group is."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_from_environment() -> int:
    return int(os.environ.get("RANK", "0"))


def longest_wait_seconds(hang_timeout: float | None) -> float:
    """How long one exchange may take. Ranks that wait for the main one's tokenisation wait in one, and a hang in
    training is for the watchdog to end, which knows more: so this is the longer time."""
    return max(2 * 3600.0, 2 * (hang_timeout or 0.0))


def _longest_wait(config: Config) -> timedelta:
    return timedelta(seconds=longest_wait_seconds(config.train.hang_timeout_seconds))


def _meet_again(backend: str, config: Config) -> None:
    """Join the process group after a restart of all ranks by the launcher, under names of this attempt's own.

    accelerate's launcher keeps one store over restarts, with the addresses of the ranks that are gone still in it:
    who reads one of these before it is overwritten waits for the dead, or is refused. accelerate and DeepSpeed take
    the group that they find.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, world_size_from_environment(), is_master=False)
    attempt = dist.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(
        backend,
        store=attempt,
        rank=rank_from_environment(),
        world_size=world_size_from_environment(),
        timeout=_longest_wait(config),
    )


def uses_deepspeed(config: Config, world_size: int) -> bool:
    """Whether DeepSpeed drives the step, rather than a plain torch optimizer."""
    return world_size > 1 or config.parallel.engine == "deepspeed" or config.parallel.offload_optimizer != "none"


def make_deterministic() -> None:
    """Have torch take operations whose results are the same to the bit each time, and refuse those that have no such
    form. cuBLAS needs a workspace of fixed size for that, which it reads from the environment at its first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def start(config: Config) -> Runtime:
    """Join the process group that the launcher describes, or stay alone.

    With several ranks, or with `parallel.engine: deepspeed`, accelerate is given a DeepSpeed plugin whose
    configuration is built from ours.

    Raises:
        UserError: the layout does not fit the ranks.
    """
    world_size = world_size_from_environment()
    config.check_layout(world_size)
    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
    cpu = config.train.device == "cpu" or asked_for_cpu or not torch.cuda.is_available()
    if config.train.deterministic:
        make_deterministic()
    use_deepspeed = uses_deepspeed(config, world_size)

    from accelerate import Accelerator

    if world_size > 1:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        tell(f"joining the process group of {world_size} ranks at {place}", quick=True)
    if use_deepspeed:
        from moe_llm.distributed.deepspeed import plugin, prepare_environment

        prepare_environment(cpu, world_size)
        from accelerate.utils import InitProcessGroupKwargs

        backend = "gloo" if cpu else "nccl"
        process_group = InitProcessGroupKwargs(backend=backend, timeout=_longest_wait(config))
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
            _meet_again(backend, config)
        accelerator = Accelerator(
            deepspeed_plugin=plugin(config, world_size),
            kwargs_handlers=[process_group],
            mixed_precision="bf16" if config.train.precision == "bf16" else "no",
            gradient_accumulation_steps=config.accumulation_steps(world_size),
        )
    else:
        accelerator = Accelerator(cpu=cpu, mixed_precision="no")  # not what a launcher says
    kernels.choose(config.train.kernels, config.train.compile, accelerator.device)
    deep_ep.choose(config, accelerator.device)
    tell("reading data and tokenizer")
    if accelerator.device.type == "cpu":
        host_memory.keep_freed()
    assert accelerator.num_processes == world_size, (
        f"the launcher started {world_size} ranks, accelerate sees {accelerator.num_processes}"
    )
    return Runtime(
        accelerator,
        accelerator.device,
        accelerator.process_index,
        world_size,
        use_deepspeed,
        config.parallel.sequence_parallel_size,
    )

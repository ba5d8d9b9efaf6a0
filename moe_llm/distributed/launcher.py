"""What a launcher has said in the environment, against what it has started and what the run is configured to do.

torchrun, `deepspeed` and `accelerate launch` with several processes set WORLD_SIZE. Other ways to start several processes
do not, and each process, or the only one, would train as if it were alone: they are refused here, before any work.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moe_llm.config import Config
from moe_llm.errors import UserError

_REMEDY = "use torchrun --nproc_per_node RANKS, or accelerate launch with a file of configs/accelerate"
# the number of processes, as MPI's launchers and a step of Slurm give it
_COUNTS = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
}


def check_launcher(config: Config, say: Callable[[str], None]) -> None:
    """Refuse processes that do not know of each other, and settings of the launcher that would have no effect; report
    to `say` where its precision is not the run's.

    Raises:
        UserError: several processes were asked for and each would train alone, `--local_rank` is not the rank, or
            FSDP or torch.compile is asked for.
    """
    environment, words = os.environ, _parent("cmdline")
    if "WORLD_SIZE" not in environment:
        _check_alone(environment, words)
    if _is_true(environment.get("ACCELERATE_USE_FSDP")):
        raise UserError(
            "accelerate launch asks for FSDP, and DeepSpeed drives a run of several ranks: launch without --use_fsdp, and "
            "set parallel.zero_stage"
        )
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(config.parallel.zero_stage))
    if stage != str(config.parallel.zero_stage):
        say(
            f"accelerate launch says zero_stage={stage}, and the run has parallel.zero_stage={config.parallel.zero_stage}, "
            "which is what counts: set parallel.zero_stage to change it"
        )
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environment:
        say(
            f"the DeepSpeed configuration {environment['ACCELERATE_DEEPSPEED_CONFIG_FILE']} of accelerate launch is not "
            "used: DeepSpeed's is built from this run's, section parallel"
        )
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise UserError(
            f"accelerate launch asks for dynamo_backend={environment['ACCELERATE_DYNAMO_BACKEND'].lower()}, and the step is "
            "not compiled: launch with dynamo_backend no"
        )
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    explicit = asked != "no" or any(word.replace("-", "_").startswith("__mixed_precision") for word in words)
    if explicit and asked != {"fp32": "no"}.get(config.train.precision, config.train.precision):
        say(
            f"accelerate launch says mixed_precision={asked}, and the run trains in train.precision="
            f"{config.train.precision}, which is what counts: set train.precision to change it"
        )


def check_local_rank(given: int | None) -> None:
    """Compare `--local_rank`, which the `deepspeed` launcher gives, with the environment.

    Raises:
        UserError: no launcher has set LOCAL_RANK, or it is another.
    """
    if given is None:
        return
    known = os.environ.get("LOCAL_RANK")
    if known is None or int(known) != given:
        there = "no launcher has set LOCAL_RANK" if known is None else f"LOCAL_RANK={known}"
        raise UserError(f"--local_rank {given} is for launchers to give, and {there}: leave it out")


def _check_alone(environment: Mapping[str, str], words: Sequence[str]) -> None:
    for name, launcher in _COUNTS.items():
        if int(environment.get(name, "1")) > 1:
            raise UserError(
                f"{launcher} has started {environment[name]} processes ({name}), which do not know of each other as "
                f"WORLD_SIZE is not set: {_REMEDY}"
            )
    # accelerate's launcher of one process names a meeting point where several were asked for, as it does with MULTI_CPU
    # or --cpu. One that was there before says nothing.
    ours = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    before = any(entry.startswith("MASTER_ADDR=") for entry in _parent("environ"))
    if ours and (not before or _processes(words) > 1):
        raise UserError(
            "accelerate launch was asked for several processes and has started one, as it does on CPUs (MULTI_CPU, --cpu) "
            f"without MPI: {_REMEDY}"
        )


def _processes(words: Sequence[str]) -> int:
    for word, following in zip(words, [*words[1:], ""]):
        name, _, value = word.replace("-", "_").partition("=")
        if name == "__num_processes" and (value or following).isdecimal():
            return int(value or following)
    return 1


def _parent(what: str) -> list[str]:
    """`cmdline` or `environ` of the process that has started this one; empty where the system does not show it."""
    try:
        return Path(f"/proc/{os.getppid()}/{what}").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []


def _is_true(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes")

"""Ranks for tests: processes that stay up and run one function after the other together, over gloo."""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


class Ranks:
    """`size` processes with the environment that a launcher gives; `run` calls a function on each of them."""

    def __init__(self, size: int):
        self.size = size
        # forked from a process that has imported what all ranks need, and done nothing else
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "deepspeed", "transformers", "moe_llm.train.run"])
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
        """The results of `function(*args)` on every rank; an exception on any rank fails the test with its trace."""
        port = _free_port()  # where a group is that is made now: the store of one that was ended may still be there
        for pipe in self._pipes:
            pipe.send((function, args, port))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(timeout), f"rank {rank} gave no answer in {timeout} s"
            failed, value = pipe.recv()
            (failures if failed else results).append(value)
        assert not failures, "\n".join(failures)
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(pipe, rank: int, size: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
    )
    import torch

    torch.set_num_threads(1)
    while (work := pipe.recv()) is not None:
        function, args, port = work
        os.environ["MASTER_PORT"] = str(port)
        try:
            pipe.send((False, function(*args)))
        except BaseException:  # noqa: BLE001 - the test fails with it
            pipe.send((True, f"rank {rank}: {traceback.format_exc()}"))


def fresh_accelerate() -> None:
    """Forget accelerate's singletons, so that the next Accelerator may be configured otherwise."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()

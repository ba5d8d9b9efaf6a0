"""Local processes that are a run's ranks, over gloo; they stay up and run one function after the other."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

# Something to be put in place around the work of a process, whose rank it is given (None: the one process alone).
Plant = Callable[[int | None], AbstractContextManager]


class RankError(Exception):
    """A rank raised, died or hung: `message` is the last line of its trace, the text the whole of it."""

    def __init__(self, message: str, trace: str):
        super().__init__(trace)
        self.message = message


VALUE, RAISED, ENDED = "value", "raised", "ended"
_GRACE = 3.0  # seconds that the others get to say why, once one has failed


def _least_telling(answer: tuple[str, Any]) -> int:
    """Sort key: a rank that ended, then one that raised, last one that only lost its connection to the others."""
    kind, trace = answer
    return 0 if kind == ENDED else 2 if "Connection closed by peer" in trace else 1


def error_of(failures: Sequence[tuple[str, Any]]) -> RankError:
    """The answer that says most of why ranks have failed."""
    kind, trace = min(failures, key=_least_telling)
    return RankError(trace.strip().splitlines()[0 if kind == ENDED else -1], trace)


def no_plant(rank: int | None) -> AbstractContextManager:
    return contextlib.nullcontext()


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Be told to stop only behind this: a process that is half started would print a trace of its own."""
    if threading.current_thread() is not threading.main_thread():  # which alone handles signals
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    held = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler or signal.SIG_DFL)
    for arrived in came:
        signal.raise_signal(arrived)


class LocalRanks:
    """`size` processes with the environment that a launcher gives. A context manager; after a `RankError` the
    processes are gone and the next `run` starts new ones. What they print goes to files that nobody sees but a
    `RankError`."""

    def __init__(self, size: int, timeout: float = 300):
        self.size, self.timeout = size, timeout
        self._processes: list = []
        self._pipes: list = []
        self._prints: tempfile.TemporaryDirectory | None = None
        self._at_work = False

    def __enter__(self) -> "LocalRanks":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def start(self) -> None:
        """Start the processes, which takes seconds; `send` does it where it has not been done."""
        context, port = multiprocessing.get_context("spawn"), _free_port()
        with _signals_wait():  # until what is there is known to `close`
            self._prints = tempfile.TemporaryDirectory(prefix="moe-llm-doctor-ranks-")
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                arguments = (theirs, rank, self._environment(rank, port), self._print_file(rank))
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)

    def send(self, function: Callable[..., Any], *args: Any, plant: Plant = no_plant) -> None:
        """Have every rank begin `function(*args)`."""
        if not self._processes:
            self.start()
        self._at_work = True
        for pipe in self._pipes:
            with contextlib.suppress(ConnectionError):  # of a rank that has ended, `receive` says how
                pipe.send((function, args, plant))

    def receive(self) -> list[Any]:
        """What `send` has every rank compute.

        Raises:
            RankError: a rank raised, ended or gave no answer in time. Where one did not raise, all are stopped, since
                it may wait for the others in an exchange for ever.
        """
        answers: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + self.timeout
        while len(answers) < self.size:
            waiting = {self._pipes[rank]: rank for rank in range(self.size) if rank not in answers}
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting[pipe]
                answers[rank] = self._answer(rank)
                if answers[rank][0] != VALUE:  # another may be the reason: let it speak
                    deadline = min(deadline, time.monotonic() + _GRACE)
        self._at_work = len(answers) < self.size
        failures = [answer for answer in answers.values() if answer[0] != VALUE]
        if not failures and not self._at_work:
            return [answers[rank][1] for rank in range(self.size)]
        if any(answers.get(rank, (None,))[0] != RAISED for rank in range(self.size)):
            self._kill()
        if not failures:
            silent = [rank for rank in range(self.size) if rank not in answers]
            failures = [(ENDED, f"ranks {silent} gave no answer in {self.timeout:g} s")]
        raise error_of(failures)

    def _answer(self, rank: int) -> tuple[str, Any]:
        """(what kind it is, the value or the trace)."""
        try:
            return self._pipes[rank].recv()
        except (EOFError, ConnectionError):
            self._processes[rank].join(5)
            code = self._processes[rank].exitcode
            return ENDED, f"rank {rank} ended with exit code {code}\n{self._last_words(rank)}"

    def run(self, function: Callable[..., Any], *args: Any, plant: Plant = no_plant) -> list[Any]:
        """`send`, then `receive`."""
        self.send(function, *args, plant=plant)
        return self.receive()

    def settle(self) -> None:
        """See to it that no rank is at work: what nobody has received is given up, and the processes with it. Files
        that ranks write to can be removed from here on."""
        if self._at_work:
            self._kill()

    def close(self) -> None:
        """End the processes; those that are at work or do not end by themselves are killed."""
        self.settle()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # a process that is gone needs no goodbye
                pipe.send(None)
        for process in self._processes:
            process.join(10)
        self._kill()

    def alone(self, function: Callable[..., Any], *args: Any, plant: Plant = no_plant, **named: Any) -> Any:
        """`function(*args, **named)` in this process, which is none of the ranks."""
        with plant(None):
            return function(*args, **named)

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        """What a rank finds in its environment, beside what this process has in its own."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
        }

    def _print_file(self, rank: int) -> str:
        assert self._prints is not None, "the ranks are started first"
        return str(Path(self._prints.name) / f"rank_{rank}.txt")

    def _last_words(self, rank: int) -> str:
        return Path(self._print_file(rank)).read_text(encoding="utf-8", errors="replace")[-4000:]

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._at_work = [], [], False
        if self._prints is not None:
            self._prints.cleanup()
            self._prints = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(pipe, rank: int, environment: dict[str, str], prints: str) -> None:
    with open(prints, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"})
    while (work := _next_work(pipe)) is not None:
        function, args, plant = work
        pipe.send(answer_of(rank, function, args, plant))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # it holds nothing that outlives it, and taking torch and DeepSpeed apart takes a second


def answer_of(rank: int, function: Callable[..., Any], args: tuple, plant: Plant) -> tuple[str, Any]:
    """(what kind it is, the value or the trace, which ends with a line that names the rank)."""
    try:
        with plant(rank):
            return VALUE, function(*args)
    except Exception as error:  # noqa: BLE001 - carried to the process that asked, which raises
        last = traceback.format_exception_only(error)[-1].strip()
        return RAISED, f"{traceback.format_exc()}\nrank {rank}: {last.splitlines()[0]}"


def _next_work(pipe) -> tuple | None:
    try:
        return pipe.recv()
    except (EOFError, KeyboardInterrupt):  # the parent is gone, or Ctrl-C went to all of us
        return None

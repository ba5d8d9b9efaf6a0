"""How many threads compute on a CPU, and how they wait for each other."""

import os

# Turns of libgomp's waiting loop before a thread that waits goes to sleep; libgomp's own are 300,000 or more: milliseconds in
# which a thread on a busy core keeps out the very thread that it waits for.
SPINS = "10000"


def wait_briefly() -> None:
    """Let threads that wait sleep soon, so that a busy neighbour does not cost most of the speed, unless the user has
    chosen how they wait. It acts on threads of an OpenMP library that is loaded later."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def may_be_chosen() -> bool:
    """Whether the number of threads may follow what other processes leave: not where the user, or a launcher of several
    ranks, has set it."""
    return "OMP_NUM_THREADS" not in os.environ and len(cores()) > 1


def cores() -> set[int]:
    """The cores that this process may use; none where the system does not tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def available_cores() -> int:
    """How many cores this process may use."""
    return len(cores()) or os.cpu_count() or 1

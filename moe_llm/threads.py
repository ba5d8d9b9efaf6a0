"""How OpenMP's threads wait for each other, decided before torch is loaded."""

import os

# Turns of libgomp's waiting loop before a thread that waits goes to sleep; libgomp's own are 300,000 or more: milliseconds in
# which a thread on a busy core keeps out the very thread that it waits for.
SPINS = "10000"


def wait_briefly() -> None:
    """Let threads that wait sleep soon, so that a busy neighbour does not cost most of the speed, unless the user has
    chosen how they wait. It acts on threads of an OpenMP library that is loaded later."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS

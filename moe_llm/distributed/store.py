"""A few words that ranks say to each other outside of any exchange."""

import os
from datetime import timedelta

from torch.distributed import TCPStore

from moe_llm.distributed.runtime import Runtime


def connect(runtime: Runtime) -> tuple:
    """Two connections (one to write, one to read: each blocks by itself) to a store that rank 0 holds. Collective."""
    wait = timedelta(seconds=10)
    held = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=wait) if runtime.is_main else None
    port = runtime.gather(held.port if held else None)[0]
    address = os.environ["MASTER_ADDR"]  # the launcher's name for rank 0's machine
    write, read = (TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=wait) for _ in range(2))
    write.set(f"rank{runtime.rank}", "0/start")
    runtime.barrier()  # from here on, whoever listens finds a word of everyone
    return write, read, held

"""Work that goes on while training does: one save at a time, in a thread.

The ranks agree on the outcome of a save among themselves (`ranks.together`), in the thread. What they exchange
there must not go through the process group of training: its collectives are matched by their order alone, and two
threads of a rank have no common order. So `ranks` is a group of its own, over gloo, which never touches a device.
The alternative, to finish a save on the main thread at some later step, costs an exchange at every step and would
put the manifest, the renaming and the deletion of old checkpoints into the steps.
"""

import threading
from collections.abc import Callable
from types import TracebackType

from moe_llm.checkpoint.plan import HostCopy
from moe_llm.checkpoint.ranks import Ranks, describe, together


class Background:
    """At most one piece of work at a time; its failure is raised by `wait`. A context manager around training.

    Leaving the context waits for the work. If training has failed, that failure goes on its way and `report` is
    told of the work's own, if any; an interrupt waits for nothing. The thread is a daemon, so that a process that
    is told to stop at once does.

    copy: what the work writes; to be changed only while there is no work.
    """

    def __init__(
        self, ranks: Ranks, report: Callable[[str], None], heartbeat: Callable[[str], None] = lambda phase: None
    ):
        """
        Args:
            ranks: for the work's own exchanges; nothing else may use it while work is going on.
            report: takes one sentence; called on rank 0 alone.
            heartbeat: told, while `wait` waits, whenever more of the copy has been written.
        """
        self.ranks = ranks
        self.copy = HostCopy()
        self._report, self._alive = report, heartbeat
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin; the work before must have been waited for."""
        assert self._thread is None, "the work before has not been waited for"
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until there is no work; raises its failure, once."""
        given = -1
        while self._thread is not None:
            self._thread.join(timeout=1.0)
            if not self._thread.is_alive():
                self._thread = None
            elif self.copy.given != given:
                given = self.copy.given
                self._alive("waiting for the save in the background")
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as failure:  # noqa: BLE001 (raised by `wait`)
            self._failure = failure

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            together(self.ranks, self.wait)
        elif not isinstance(error, KeyboardInterrupt):
            try:
                self.wait()
            except Exception as failure:  # noqa: BLE001 (told; `error` is what ends the run)
                if self.ranks.rank == 0:
                    self._report(describe(failure))

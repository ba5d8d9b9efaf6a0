"""Torch's extension cache: a lock whose owner is gone is no obstacle, and a living owner is waited for by name."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from moe_llm import locks
from moe_llm.distributed.extension_locks import is_stale, remove_if_stale

SOURCE = '#include <torch/extension.h>\nint two() { return 2; }\nPYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("two", &two); }\n'
# The build itself is not under test, and takes a minute: the compiler is one that copies a finished library.
BUILD = """
import sys
from pathlib import Path
from torch.utils import cpp_extension
from moe_llm.distributed import extension_locks, deepspeed
from moe_llm import locks
from moe_llm.logs import show_messages

show_messages(command=True)
extension_locks.install()
locks.SAY_AFTER_SECONDS = 1.0
built = []

def build(*arguments, **named):
    built.append(arguments)
    Path(named["build_directory"], "built").touch()

cpp_extension._write_ninja_file_and_build_library = build
cpp_extension._import_module_from_library = lambda name, path, is_python: Path(path, "built").exists()
done = cpp_extension.load("probe", [sys.argv[1]], build_directory=sys.argv[2])
print("built" if built else "found", done)
"""


def start(tmp_path: Path) -> subprocess.Popen:
    source = tmp_path / "probe.cpp"
    source.write_text(SOURCE)
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(source), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RANK": "1"},
    )


def holder(lock: Path) -> subprocess.Popen:
    """A process that holds the lock as torch does, until it is killed."""
    code = textwrap.dedent(
        f"""
        import time
        from torch.utils.file_baton import FileBaton
        baton = FileBaton({str(lock)!r})
        assert baton.try_acquire()
        print("held", flush=True)
        time.sleep(60)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_start_beside_a_stale_lock_builds_and_says_what_it_removed(tmp_path):
    (tmp_path / "lock").touch()
    out, err = start(tmp_path).communicate(timeout=60)
    assert out == "built True\n"
    assert f"rank 1: removed {tmp_path / 'lock'}" in err
    assert not (tmp_path / "lock").exists()


def test_a_start_beside_a_living_lock_waits_and_says_for_whom_and_builds_when_that_dies(tmp_path):
    owner = holder(tmp_path / "lock")
    waiting = start(tmp_path)
    assert f"waiting for process {owner.pid}, which holds {tmp_path / 'lock'}" in waiting.stderr.readline()
    assert (tmp_path / "lock").exists()
    owner.kill()
    owner.wait()
    out, err = waiting.communicate(timeout=60)
    assert out == "built True\n"
    assert "removed" in err


def test_what_the_owner_has_built_is_used(tmp_path):
    owner = holder(tmp_path / "lock")
    waiting = start(tmp_path)
    assert "waiting for process" in waiting.stderr.readline()
    (tmp_path / "built").touch()
    (tmp_path / "lock").unlink()
    assert waiting.communicate(timeout=60)[0] == "found True\n"
    owner.kill()
    owner.wait()


def test_a_lock_is_stale_only_where_no_process_has_it_open(tmp_path):
    lock = tmp_path / "lock"
    assert not remove_if_stale(lock)
    with open(lock, "w"):
        assert not is_stale(lock)
        assert locks.process_with_open(lock) == os.getpid()
    assert is_stale(lock)
    assert remove_if_stale(lock)


def test_on_a_shared_file_system_only_a_long_silence_counts(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setattr("moe_llm.distributed.extension_locks.can_tell", lambda path: False)
    assert not is_stale(lock)
    for path in (lock, tmp_path):
        os.utime(path, (time.time() - 4000, time.time() - 4000))
    assert is_stale(lock)


@pytest.mark.parametrize(("kind", "told"), [("ext4", True), ("overlay", True), ("nfs4", False), ("fuse.sshfs", False)])
def test_whether_a_file_system_is_shared_is_read_from_the_mounts(tmp_path, monkeypatch, kind, told):
    real = Path.read_text
    table = f"x / ext4 rw 0 0\nx {tmp_path} {kind} rw 0 0\n"
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: table if str(self) == "/proc/self/mounts" else real(self, *a, **k)
    )
    assert locks.can_tell(tmp_path / "lock") is told


def test_whoever_prepares_text_is_waited_for_by_name(tmp_path, monkeypatch, capfd):
    from moe_llm.data.files import building

    code = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from moe_llm.data.files import building
        with building(Path({str(tmp_path)!r}), "tokens-1"):
            print("inside", flush=True)
            time.sleep(3)
        """
    )
    monkeypatch.setattr(locks, "SAY_AFTER_SECONDS", 0.5)
    heard = []
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "inside\n"
        monkeypatch.setattr(locks, "listeners", [lambda phase, quick: heard.append((phase, quick))])
        with building(tmp_path, "tokens-1"):
            pass
    assert f"waiting for process {other.pid}, which holds" in capfd.readouterr().err
    assert heard
    assert all(str(other.pid) in phase and not quick for phase, quick in heard)

"""Asked to stop, a run saves and says how to go on; going on is then exact."""

import os
import signal
import sys

import pytest
from support import runs
from support.ci import dear

from moe_llm.cli import main

LONG = {
    "train": {"max_steps": 100_000, "micro_batch_size": 2, "global_batch_size": 4},
    "checkpoint": {"every_steps": None},
}


def ended(process, timeout: float = 90) -> tuple[str, str]:
    out, err = process.communicate(timeout=timeout)
    assert "Traceback" not in err, err
    return out, err


def saved_step(run_dir) -> int:
    [checkpoint] = (run_dir / "checkpoints").glob("step-*")
    assert (run_dir / "checkpoints/latest").resolve() == checkpoint.resolve()
    return int(checkpoint.name[5:])


@pytest.mark.parametrize("number", dear([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_a_signal_saves_and_going_on_equals_uninterrupted(make_config, tmp_path, number):
    # the learning rate must not depend on the length, which is another one after the stop
    constant = {**LONG, "optim": {"lr": 3e-3, "schedule": "constant"}}
    config, run_dir = make_config("stopped", **constant), tmp_path / "stopped"
    with runs.started(runs.single(config)) as process:
        runs.wait_for(lambda: runs.steps_written(run_dir) >= 3, process)
        process.send_signal(number)
        out, _ = ended(process)
        assert process.returncode == 128 + number, "an unfinished run must not look finished"
    step = saved_step(run_dir)
    checkpoint = run_dir / f"checkpoints/step-{step:08d}"
    assert out == f"stopped and saved: run the same command again to go on from {checkpoint}\n"
    assert len(runs.records(run_dir)) == step

    length = f"train.max_steps={step + 3}"
    assert main(["train", str(config), length]) == 0
    assert main(["train", str(make_config("straight", **constant)), length]) == 0
    assert runs.timeless(run_dir) == runs.timeless(tmp_path / "straight")


SLOW_SAVE = """
import sys, time
import moe_llm.train.trainer as trainer
save = trainer.save_checkpoint
def slow(*args, **kwargs):
    open(sys.argv[1], "w").close()
    time.sleep(60)
trainer.save_checkpoint = slow
from moe_llm.cli import main
sys.exit(main(["train", *sys.argv[2:]]))
"""


def test_a_second_ctrl_c_stops_at_once(make_config, tmp_path):
    config, run_dir, saving = make_config("stopped", **LONG), tmp_path / "stopped", tmp_path / "saving"
    with runs.started([sys.executable, "-c", SLOW_SAVE, str(saving), str(config)]) as process:
        runs.wait_for(lambda: runs.steps_written(run_dir) >= 1, process)
        process.send_signal(signal.SIGINT)
        runs.wait_for(saving.exists, process)
        process.send_signal(signal.SIGINT)
        out, _ = ended(process, timeout=20)
        assert process.returncode == 130
    assert out == ""
    assert not list(run_dir.glob("checkpoints/step-*"))


SLOW_DATA = """
import sys, time
import moe_llm.train.run as run
def slow(*args, **kwargs):
    open(sys.argv[1], "w").close()
    time.sleep(60)
run.load_data = slow
from moe_llm.cli import main
sys.exit(main(["train", *sys.argv[2:]]))
"""


def test_a_signal_before_training_stops_there(make_config, tmp_path):
    """Tokenising may take hours, and has nothing to save."""
    config, preparing = make_config("stopped", **LONG), tmp_path / "preparing"
    with runs.started([sys.executable, "-c", SLOW_DATA, str(preparing), str(config)]) as process:
        runs.wait_for(preparing.exists, process)
        process.send_signal(signal.SIGTERM)
        out, _ = ended(process, timeout=20)
        assert process.returncode == 143
    assert out == "stopped before training, so nothing was saved: run the same command again to start\n"
    assert not (tmp_path / "stopped/checkpoints").exists()


def test_handlers_are_put_back_and_a_request_waits_for_the_loop():
    from moe_llm.train.signals import StoppedEarly, StopRequest

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        with pytest.raises(StoppedEarly):
            signal.raise_signal(signal.SIGTERM)
        stop.defer()
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a scheduler may repeat itself
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def stop_two_ranks(make_config, tmp_path, send) -> tuple[int, str]:
    config, run_dir = make_config("stopped", parallel={"expert_parallel_size": 2}, **LONG), tmp_path / "stopped"
    with runs.started(runs.launched(config)) as process:
        runs.wait_for(lambda: runs.steps_written(run_dir) >= 2, process)
        send(process.pid)
        out, err = process.communicate(timeout=90)
    assert out.count("stopped and saved") == 1, err
    assert saved_step(run_dir) >= 2
    return process.returncode, err


def test_a_signal_to_one_rank_saves_on_all(make_config, tmp_path):
    code, err = stop_two_ranks(
        make_config, tmp_path, lambda launcher: os.kill(runs.rank_processes(launcher)[1], signal.SIGTERM)
    )
    assert code == 1, err  # the launcher's own, for ranks that end with 143
    assert "exitcode  : 143" in err


@pytest.mark.grid
def test_ctrl_c_at_the_launchers_terminal_saves_on_all(make_config, tmp_path):
    """The launcher passes the signal on and waits. That it then exits with 1 is its own, and in the README."""
    code, err = stop_two_ranks(make_config, tmp_path, lambda launcher: os.killpg(launcher, signal.SIGINT))
    assert code == 1, err

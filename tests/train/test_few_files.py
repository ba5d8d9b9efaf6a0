"""How many files of ours a reader opens to follow a step, or a command down to a matrix product."""

import sys
from pathlib import Path

import pytest

import moe_llm
from moe_llm.cli import main
from moe_llm.ops import native
from moe_llm.train.trainer import Trainer
from tests.support.runs import sections, write_text

PACKAGE = Path(moe_llm.__file__).parent


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """Of one run by the command line: the files whose functions its second step calls, and the deepest stack of files
    from the command to a product of the experts."""
    import yaml

    folder = tmp_path_factory.mktemp("run")
    text = write_text(folder / "text.txt", lines=60)
    raw = sections(text, folder / "cache", folder / "run", train={"max_steps": 3})
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    called: set[str] = set()
    stack: set[str] = set()
    real_step, real_call, deepest = Trainer.train_step, native.call, 0

    def ours(frame):
        path = Path(frame.f_code.co_filename)
        return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None

    def note(frame, event, _):
        if event == "call" and (file := ours(frame)) is not None:
            called.add(file)

    def step(trainer):
        if trainer.position.step != 1:
            return real_step(trainer)
        sys.setprofile(note)
        try:
            return real_step(trainer)
        finally:
            sys.setprofile(None)

    def call(*arguments):
        nonlocal deepest, stack
        frame, files, depth = sys._getframe(), set(), 0
        while frame is not None:
            if (file := ours(frame)) is not None:
                files.add(file)
            frame, depth = frame.f_back, depth + 1
        if "model/moe/experts.py" in files and depth > deepest:
            deepest, stack = depth, files
        return real_call(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        patch.setattr(native, "call", call)
        assert main(["train", str(folder / "run.yaml")]) in (0, None)
    return called, stack


def test_a_plain_training_step_passes_through_at_most_25_files(followed):
    called, _ = followed
    assert {"train/trainer.py", "model/decoder.py", "model/moe/router.py"} <= called
    assert len(called) <= 25, "\n".join(sorted(called))


def test_at_most_15_files_lie_between_the_command_and_an_experts_product(followed):
    _, stack = followed
    if not stack:
        pytest.skip("the C++ kernels, whose calls are followed, are off")
    assert "cli/__init__.py" in stack
    assert len(stack) <= 15, "\n".join(sorted(stack))

"""What is given in place of a checkpoint's directory: the sentence says what is there, and names one that is near."""

import os
import shutil
from pathlib import Path

import pytest
from support.checkpoints import FakeState, random_tensors, save_arguments, small_config

from moe_llm.checkpoint.folder import check_checkpoint_directory
from moe_llm.checkpoint.state import save_checkpoint
from moe_llm.checkpoint.verify import verify_checkpoint
from moe_llm.errors import UserError

CONFIG = small_config(num_hidden_layers=1, num_local_experts=2)
NEWEST = "checkpoints/step-00000005"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory with checkpoints of steps 7 and, of a later save, 5."""
    path = tmp_path_factory.mktemp("with spaces é") / "run"
    for step in (7, 5):
        save_checkpoint(
            path / "checkpoints", FakeState(random_tensors(CONFIG, step)), **save_arguments(CONFIG, step=step)
        )
    (path / "empty").mkdir()
    (path / "config.yaml").write_text("model: {}\n")
    os.symlink("step-00000009", path / "checkpoints/best")
    return path


@pytest.mark.parametrize(
    ("given", "what", "near"),
    [
        (".", "holds no config.json but checkpoints, config.yaml, empty", NEWEST),
        ("checkpoints", "holds no config.json but best, checkpoints.json, latest, step-00000005, ...", NEWEST),
        ("checkpoints/step-00000006", "does not exist", NEWEST),
        ("checkpoints/best", "is a link to step-00000009, which is gone", NEWEST),
        ("checkpoints/step-00000007/trainer", "holds no config.json but ", "checkpoints/step-00000007"),
        ("checkpoints/step-00000007/model.safetensors", "is a file", "checkpoints/step-00000007"),
        ("latest", "does not exist", NEWEST),
        ("empty", "is empty", NEWEST),
        ("config.yaml", "is a file", NEWEST),
    ],
)
def test_what_is_no_checkpoint_is_described_and_one_nearby_is_named(run, given, what, near):
    with pytest.raises(UserError) as raised:
        check_checkpoint_directory(run / given)
    sentence = str(raised.value)
    assert sentence.startswith(f"checkpoint {str(run / given)!r} {what}")
    assert sentence.endswith(f": name a checkpoint directory, such as {run / near}")


@pytest.mark.parametrize("read", [check_checkpoint_directory, verify_checkpoint])
@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "trainer/config.yaml", "trainer/manifest.json"]
)
def test_a_small_file_that_a_checkpoint_has_lost_is_named(run, tmp_path, file, read):
    whole = Path(shutil.copytree(run / "checkpoints/latest", tmp_path / "checkpoint"))
    (whole / file).unlink()
    with pytest.raises(UserError, match=f"has lost its {file}" if file == "config.json" else f"{file} is missing"):
        read(whole)


def test_a_page_may_be_missing_or_another(run, tmp_path):
    whole = Path(shutil.copytree(run / "checkpoints/latest", tmp_path / "checkpoint"))
    (whole / "README.md").write_text("mine")
    check_checkpoint_directory(whole)
    (whole / "README.md").unlink()
    check_checkpoint_directory(whole)


def test_where_none_is_near_it_says_how_one_looks(tmp_path):
    with pytest.raises(UserError, match=r"is empty: name a checkpoint directory, such as RUN/checkpoints/step-0"):
        check_checkpoint_directory(tmp_path)


def test_the_links_are_checkpoints_and_so_is_a_copy_that_has_followed_them(run, tmp_path):
    check_checkpoint_directory(run / "checkpoints/latest")
    shutil.copytree(run / "checkpoints/latest", tmp_path / "latest")
    check_checkpoint_directory(tmp_path / "latest")

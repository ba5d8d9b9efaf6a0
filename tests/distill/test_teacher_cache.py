"""What teachers said, from disk: the same as beside them, once and for all, for what it was said of."""

import shutil

import numpy as np
import pytest
import torch
from support.distillation import learn

from moe_llm.config import load_config
from moe_llm.distill import cache as module
from moe_llm.distill import teaching
from moe_llm.errors import UserError


@pytest.fixture
def config(student, dense, mixtures, tmp_path):
    """Of a run whose teacher, and all that it leaves, are its own."""
    shutil.copytree(dense, tmp_path / "teacher")
    path = student(
        "run",
        {"teachers": [{"path": str(tmp_path / "teacher")}], "temperature": 1.5},
        tokenizer={"path": str(mixtures[0])},
    )
    return lambda *words: load_config(path, ["train.max_steps=2", *words])


@pytest.fixture
def built(monkeypatch):
    """Blocks that teachers have been asked of, one number for each part."""
    counts = []
    add = module.TeacherCache.add

    def counted(self, blocks, *rest):
        counts.append(sum(len(batch.input_ids_BS) for batch in blocks))
        add(self, blocks, *rest)

    monkeypatch.setattr(module.TeacherCache, "add", counted)
    return counts


def directories(tmp_path):
    return sorted(path for path in (tmp_path / "cache").glob("teacher-*") if path.is_dir())


def test_all_tokens_kept_are_the_teacher_itself(config):
    live, kept, few = (
        learn(config(*words)) for words in ([], ["distill.cache_top_k=100000"], ["distill.cache_top_k=3"])
    )
    for ours, theirs, less in zip(kept["losses"], live["losses"], few["losses"]):
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert less["distill"] < theirs["distill"]


def test_a_second_run_needs_no_teacher_and_a_longer_one_what_is_new(config, built, tmp_path):
    words = ["distill.cache_top_k=6"]
    first = learn(config(*words, "logging.console=plain"))
    assert built == [8]  # of two steps
    assert len(first["said"]) == 1
    (directory,) = directories(tmp_path)
    again = learn(config(*words, "logging.console=plain"))
    assert again["losses"] == first["losses"]
    assert not again["said"]
    assert learn(config(*words, "train.max_steps=3"))["losses"][:2] == first["losses"]
    assert built == [8, 4]
    shutil.move(tmp_path / "teacher", tmp_path / "gone")
    assert learn(config(*words))["losses"] == first["losses"]
    assert built == [8, 4]
    with pytest.raises(UserError, match="no cache of what it said"):
        learn(config(*words, "distill.temperature=3"))
    with pytest.raises(UserError, match="cannot be loaded"):
        learn(config(*words, "train.max_steps=4"))
    shutil.rmtree(directory)
    with pytest.raises(UserError, match="no cache of what it said"):
        learn(config(*words))


def test_what_is_kept_is_of_this_teacher_and_this_temperature(config, tmp_path, dense):
    words = ["distill.cache_top_k=6"]
    first = learn(config(*words))["losses"]
    for i, changed in enumerate(
        [["distill.temperature=2"], ["distill.cache_top_k=7"], ["distill.teachers.0.dtype=bf16"]], start=2
    ):
        assert learn(config(*words, *changed))["losses"] != first
        assert len(directories(tmp_path)) == i
    # what is of the student alone needs no other
    for changed in (["distill.alpha=0.9"], ["distill.divergence=reverse_kl"], ["distill.teachers.0.weight=3"]):
        learn(config(*words, *changed))
        assert len(directories(tmp_path)) == 4
    from safetensors.torch import load_file, save_file

    file = tmp_path / "teacher/model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)
    save_file(tensors, file, {"format": "pt"})
    assert learn(config(*words))["losses"] != first
    assert len(directories(tmp_path)) == 5
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(UserError, match="2 caches of what it said at different times"):
        learn(config(*words))


def test_other_text_and_other_blocks_are_asked_anew(config, built):
    words = ["distill.cache_top_k=6"]
    learn(config(*words))
    learn(config(*words, "run.seed=6", "train.max_steps=1"))
    learn(config(*words, "data.sequence_length=16", "train.max_steps=1"))
    assert built[0] == 8
    assert built[-1] == 4
    assert sum(built[1:-1]) <= 4  # another order may come to what is there
    before = len(built)
    learn(config(*words, "data.isolate_documents=false", "train.max_steps=1"))
    assert built[before:] == [4]  # the same tokens, which see others


def test_a_build_that_was_killed_loses_one_part(config, built, monkeypatch):
    monkeypatch.setattr(teaching, "_PART_BYTES", 1)  # a block a part
    words, save, saved = ["distill.cache_top_k=6"], np.save, []

    def dying(file, array):
        saved.append(file)
        if len(saved) == 4 * 3 + 2:
            raise KeyboardInterrupt
        save(file, array)

    monkeypatch.setattr(np, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        learn(config(*words))
    monkeypatch.setattr(np, "save", save)
    assert built == [1, 1, 1, 1]
    found = learn(config(*words))
    assert built[4:] == [1] * 5
    live = learn(config(*words, "distill.cache_top_k=320"))["losses"]
    assert found["losses"][0]["lm"] == live[0]["lm"]


def test_no_space_is_told_and_leaves_no_part(config, monkeypatch, tmp_path):
    def full(file, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="no space left for"):
        learn(config("distill.cache_top_k=6"))
    assert not [path for path in directories(tmp_path)[0].iterdir() if path.is_dir()]


def test_a_block_beyond_those_foreseen_is_asked_of_the_teacher(config, monkeypatch):
    """As after `train.on_nan=rollback`, where the data goes on behind what was lost."""
    words = ["distill.cache_top_k=6"]
    expected = learn(config(*words, "train.max_steps=3"))["losses"]
    fill = teaching.CachedTeachers.fill
    monkeypatch.setattr(
        teaching.CachedTeachers, "fill", lambda self, blocks, start, samples, say: fill(self, blocks, start, 4, say)
    )
    words += [f"data.cache_dir={config().data.cache_dir}-other"]
    for ours, theirs in zip(learn(config(*words, "train.max_steps=3"))["losses"], expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_what_is_kept_sums_to_one_and_ids_fit():
    """The tail has the mass that is left, also where it is far below what subtraction could see."""

    class Sure:
        width = 70_000

        def hidden(self, batch):
            return []

        def log_p(self, hidden, start, stop, device):
            logits = torch.zeros(stop - start, self.width)
            logits[:, 69_999] = 60.0
            return logits.log_softmax(-1)

    from support.training import rows

    named = module.name_successors(rows(0, 0, 2), Sure(), 1, torch.device("cpu"))
    assert named.ids_NK.dtype == np.uint32
    assert (named.ids_NK == 69_999).all()
    assert named.log_p_NJ[:, 1] == pytest.approx(np.log(69_999) - 60, rel=1e-5)

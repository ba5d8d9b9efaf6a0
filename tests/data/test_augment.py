"""`data.sources.N.augment`: what is masked, cut out or edited is what was asked for, every other token stays, labels are
the text's, and the same sample is changed in the same way at any number of ranks and after a resume."""

import difflib

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_llm.config.augment import AugmentConfig
from moe_llm.config.load import validate
from moe_llm.data.augment import Augmentation
from moe_llm.data.blocks import TrainBlocks
from moe_llm.data.loader import TrainLoader, load_data
from moe_llm.data.packing import IGNORED
from moe_llm.errors import UserError

UNKNOWN, BOS, EOS, SEPARATOR = 0, 1, 2, 3


@pytest.fixture(scope="module")
def tokenizer():
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "=>", "gap"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def source(random_blocks):
    """Documents of distinct tokens from 1000 on, in blocks of 64."""
    return random_blocks([40, 150, 60, 300], 64, first_id=1000)


def rows(source, tokenizer, seed: int = 5, count: int = 9, start: int = 0, **settings):
    changes = {0: Augmentation(AugmentConfig(**settings), tokenizer, "data.sources.0")} if settings else None
    return TrainBlocks([source], None, seed, augmentations=changes).rows(start, count)


def documents(batch):
    """(ids, labels) of each document in each row, with what the plain block has there."""
    for row in range(len(batch.input_ids_BS)):
        place = 0
        for length in batch.runs_B[row]:
            if batch.attention_mask_BS[row, place]:
                yield row, slice(place, place + length)
            place += length


def test_masked_tokens_are_read_as_the_mask_and_learned_as_they_are(source, tokenizer):
    plain, found = rows(source, tokenizer), rows(source, tokenizer, kind="mask", rate=0.3)
    torch.testing.assert_close(found.labels_BS, plain.labels_BS)
    changed = found.input_ids_BS != plain.input_ids_BS
    assert (found.input_ids_BS[changed] == UNKNOWN).all()
    special = (plain.input_ids_BS == BOS) | (plain.input_ids_BS == EOS) | ~plain.attention_mask_BS
    assert not changed[special].any()
    assert 0.2 < changed.sum().item() / (~special).sum().item() < 0.4
    named = rows(source, tokenizer, kind="mask", rate=0.3, mask_token="gap")
    assert (named.input_ids_BS[changed] == 4).all()


def test_spans_put_back_make_the_text_and_they_alone_are_learned(source, tokenizer):
    plain = rows(source, tokenizer)
    found = rows(source, tokenizer, kind="span", rate=0.3, span_length=2, separator="=>")
    cut = kept = 0
    for row, here in documents(plain):
        before, ids, labels = (b[row, here].tolist() for b in (plain.input_ids_BS, found.input_ids_BS, found.labels_BS))
        if SEPARATOR not in ids:
            assert ids == before  # too short for a span
            continue
        at, end = ids.index(SEPARATOR), labels.index(EOS)
        assert labels[:at] == [IGNORED] * at
        assert labels[end + 1 :] == [IGNORED] * (len(ids) - end - 1)
        assert labels[at:end] == ids[at + 1 : end + 1], "each place is to say what stands at the next"
        restored = [list(part) for part in _split(labels[at:end], UNKNOWN)]
        text: list[int] = []
        for token in ids[:at]:
            text += restored.pop(0) if token == UNKNOWN else [token]
        assert not restored
        body = [token for token in before if token != EOS]
        assert text == body[: len(text)]
        cut += sum(token not in (UNKNOWN, EOS) for token in labels[at:end])
        kept += sum(token not in (UNKNOWN, BOS) for token in ids[:at])
    assert 0.2 < cut / (cut + kept) < 0.4


def _split(tokens, mark):
    assert tokens[0] == mark
    part: list[int] = []
    for token in tokens[1:]:
        if token == mark:
            assert part, "spans are not empty"
            yield part
            part = []
        else:
            part.append(token)
    yield part


def test_an_edited_text_is_followed_by_the_text(source, tokenizer):
    plain, found = rows(source, tokenizer), rows(source, tokenizer, kind="edits", rate=0.5, separator="=>")
    likeness = []
    for row, here in documents(plain):
        before, ids, labels = (b[row, here].tolist() for b in (plain.input_ids_BS, found.input_ids_BS, found.labels_BS))
        if SEPARATOR not in ids:
            continue
        at, end = ids.index(SEPARATOR), labels.index(EOS)
        learned, body = labels[at:end], [token for token in before if token not in (BOS, EOS)]
        assert learned == body[: len(learned)]
        assert labels[:at] == [IGNORED] * at
        edited = [token for token in ids[:at] if token != BOS]
        assert set(edited) <= set(learned)
        likeness.append(difflib.SequenceMatcher(None, edited, learned, autojunk=False).ratio())
    assert len(likeness) > 5
    assert 0.6 < np.mean(likeness) < 0.98


@pytest.mark.parametrize("kind", ["mask", "span", "edits"])
def test_a_sample_is_changed_by_its_seed_and_number_alone(source, tokenizer, kind):
    whole = rows(source, tokenizer, kind=kind, rate=0.3, count=24)
    assert torch.equal(
        rows(source, tokenizer, kind=kind, rate=0.3, start=16, count=8).input_ids_BS, whole.input_ids_BS[16:]
    )
    assert not torch.equal(rows(source, tokenizer, seed=6, kind=kind, rate=0.3).input_ids_BS, whole.input_ids_BS[:9])
    again = {tuple(row) for row in whole.input_ids_BS.tolist()}
    assert len(again) > len(source), "an epoch later a block is changed in another way"
    changes = {0: Augmentation(AugmentConfig(kind=kind, rate=0.3), tokenizer, "data.sources.0")}
    blocks = TrainBlocks([source], None, 5, augmentations=changes)
    ranks = [
        TrainLoader(blocks, position=8, global_batch_size=8, micro_batch_size=2, rank=r, world_size=2) for r in (0, 1)
    ]
    found = [batch.input_ids_BS for loader in ranks for batch in next(loader)]
    for loader in ranks:
        loader.close()
    together = torch.stack([found[0], found[2], found[1], found[3]]).flatten(0, 1)
    assert torch.equal(together, whole.input_ids_BS[8:16])


def test_a_share_of_the_documents_is_changed_and_other_sources_are_not(source, random_blocks, tokenizer):
    other = random_blocks([200], 64, first_id=5000)
    settings = AugmentConfig(kind="mask", rate=0.5, share=0.5)
    changes = {0: Augmentation(settings, tokenizer, "data.sources.0")}
    plain, found = (TrainBlocks([source, other], None, 1, augmentations=a).rows(0, 40) for a in (None, changes))
    touched = [
        bool((found.input_ids_BS[row, here] != plain.input_ids_BS[row, here]).any()) for row, here in documents(plain)
        if plain.sources_B[row] == 0 and here.stop - here.start > 10
    ]  # fmt: skip
    assert 0.25 < np.mean(touched) < 0.75
    of_other = plain.sources_B == 1
    assert torch.equal(found.input_ids_BS[of_other], plain.input_ids_BS[of_other])


def test_a_run_reads_changed_training_text_and_unchanged_held_out_text(make_config, make_text, tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n".join(make_text(i) for i in range(40)))
    plain = {"type": "files", "path": str(tmp_path / "a.txt"), "document": "line"}
    extra = {"data": {"validation_fraction": 0.2}}
    found = [
        load_data(make_config([{**plain, **more}], **extra), tokenizer, show_progress=False)
        for more in ({}, {"augment": {"kind": "mask", "rate": 0.5, "mask_token": "gap"}})
    ]
    read = [data.train.rows(0, 8).input_ids_BS for data in found]
    assert (read[1] == 4).any()
    assert not torch.equal(*read)
    held_out = [data.validation.batches(micro_batch_size=4)[0].input_ids_BS for data in found]
    assert torch.equal(*held_out)


@pytest.mark.parametrize(
    ("source", "data", "words"),
    [
        ({"augment": {"kind": "mask", "span_length": 2}}, {}, "span_length=2.0 applies to kind span, not to mask"),
        ({"augment": {"kind": "edits", "mask_token": "x"}}, {}, "applies to kind mask and span, not to edits"),
        ({"augment": {"kind": "mask", "rate": 1}}, {}, "augment.rate"),
        ({"augment": {"kind": "span"}}, {"isolate_documents": False}, "works on whole documents"),
        (
            {"augment": {"kind": "mask"}, "type": "files", "path": "x", "content": "chat"},
            {},
            "does not apply to content: chat",
        ),
        ({}, {"validation_sources": [{"type": "python_stdlib", "augment": {"kind": "mask"}}]}, "held-out text"),
    ],
)
def test_settings_that_do_not_fit_are_refused(source, data, words):
    raw = {
        "model": {},
        "data": {"sources": [{"type": "python_stdlib", **source}], **data},
        "train": {"max_steps": 1},
    }
    with pytest.raises(UserError) as refused:
        validate(raw)
    assert words in str(refused.value)


def test_a_mask_that_is_no_token_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"data.sources.3.augment.mask_token='nothing' is no token"):
        Augmentation(AugmentConfig(kind="mask", mask_token="nothing"), tokenizer, "data.sources.3")


@pytest.mark.parametrize("kind", ["span", "edits"])
def test_documents_too_short_for_it_stay_as_they_are(random_blocks, tokenizer, kind):
    """Also where what parts the text from what is restored is longer than they are."""
    source = random_blocks([1, 2, 3, 1, 4, 5, 1, 2, 60], 16, first_id=1000)
    plain = rows(source, tokenizer, count=5)
    found = rows(source, tokenizer, count=5, kind=kind, rate=0.5, separator="=> => => => =>")
    assert torch.equal(found.attention_mask_BS, plain.attention_mask_BS)
    changed = 0
    for row, here in documents(plain):
        same = torch.equal(found.input_ids_BS[row, here], plain.input_ids_BS[row, here])
        assert same or here.stop - here.start > 6
        changed += not same
    assert changed

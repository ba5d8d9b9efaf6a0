"""Packed examples give what each gives alone: loss, gradient, and every one of them exactly once."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_llm.data.blocks import TrainBlocks, ValidationBlocks
from moe_llm.data.cache import TokenizedText
from moe_llm.data.examples import PackedExamples, best_fit
from moe_llm.data.loader import load_data, load_evaluation
from moe_llm.data.packing import IGNORED, as_batch
from moe_llm.data.tokenizer import build_tokenizer
from moe_llm.errors import UserError

EXAMPLES = st.lists(
    st.integers(2, 30).flatmap(lambda n: st.lists(st.booleans(), min_size=n, max_size=n)), min_size=1, max_size=12
)


def tokenised(masks: list[list[bool]]) -> TokenizedText:
    """Examples of tokens that occur once; one of each example, not its first, is a target in any case."""
    ids = np.arange(10, 10 + sum(map(len, masks)), dtype=np.uint16)
    starts = np.cumsum([0] + [len(mask) for mask in masks])
    targets = np.concatenate(masks).astype(np.uint8)
    targets[starts[:-1]] = 0
    targets[starts[1:] - 1] |= [not targets[a:b].any() for a, b in pairwise(starts)]
    sizes = np.array([7 * len(mask) for mask in masks])
    return TokenizedText(ids, starts, sizes, int(sizes.sum()), targets)


def batch_of(blocks: PackedExamples):
    arrays = blocks.empty_arrays(len(blocks))
    for i in range(len(blocks)):
        blocks.write(i, i, arrays)
    return as_batch(arrays)


@settings(max_examples=150, deadline=None)
@given(EXAMPLES, st.integers(2, 24), st.sampled_from(["drop", "truncate"]))
def test_each_example_is_whole_once_or_counted(masks, length, overlong):
    text = tokenised(masks)
    blocks = PackedExamples(text, length, overlong, pad=2)
    batch = batch_of(blocks)
    found, dropped, truncated = {}, 0, 0
    for ids, labels, documents, positions, real in zip(
        batch.input_ids_BS, batch.labels_BS, batch.document_ids_BS, batch.position_ids_BS, batch.attention_mask_BS
    ):
        assert ((documents == -1) == ~real).all()
        assert (ids[~real] == 2).all()
        assert (labels[~real] == IGNORED).all()
        for nth in documents[real].unique().tolist():
            mine = documents == nth
            assert positions[mine].tolist() == list(range(int(mine.sum())))
            found[int(ids[mine][0])] = (ids[mine].tolist(), labels[mine].tolist())
    for begin, end in pairwise(text.starts):
        tokens, targets = text.tokens_N[begin:end].tolist(), text.targets_N[begin:end].tolist()
        over = len(tokens) - 1 > length
        tokens, targets = tokens[: length + 1], targets[: length + 1]
        if over and (overlong == "drop" or not any(targets)):
            dropped += 1
            assert tokens[0] not in found
            continue
        truncated += over
        expected = [t if known else IGNORED for t, known in zip(tokens[1:], targets[1:])]
        assert found.pop(tokens[0]) == (tokens[:-1], expected)
    assert not found
    assert (blocks.dropped, blocks.truncated, blocks.kept) == (dropped, truncated, len(masks) - dropped)
    assert blocks.targets == batch.num_targets
    if not dropped + truncated:
        assert blocks.bytes == pytest.approx(text.bytes)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 30))
def test_bins_are_filled_well(lengths, capacity):
    bins = best_fit(np.array(lengths, np.int64), capacity)
    assert sorted(item for one in bins for item in one) == list(range(len(lengths)))
    filled = [sum(lengths[item] for item in one) for one in bins]
    assert all(total <= capacity for total in filled)
    assert sum(total * 2 <= capacity for total in filled) <= 1, "two half-empty bins could have been one"
    assert best_fit(np.array(lengths, np.int64), capacity) == bins


MODEL = {
    "vocab_size": 200,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "router_aux_loss_coef": 0.3,
    "router_z_loss_coef": 0.1,
}


def gradients(batches, **changes) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one optimizer step that takes these micro-batches."""
    from types import SimpleNamespace

    from moe_llm.config import ModelConfig
    from moe_llm.data.packing import model_inputs
    from moe_llm.distributed.step_loss import StepLoss
    from moe_llm.model.init import build_model

    config = ModelConfig(**{**MODEL, **changes})
    model = build_model(config, 3)
    step_loss = StepLoss(config, SimpleNamespace(world_size=1, sum=lambda tensor: tensor), batches)
    loss = 0.0
    for batch in batches:
        total = step_loss(model(**model_inputs(batch))).total
        total.backward()
        loss += total.item()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def alone(text: TokenizedText) -> list:
    """Each example without padding in a batch of its own, without masks that say where it ends."""
    batches = []
    for begin, end in pairwise(text.starts):
        targets = text.targets_N[begin:end]
        one = TokenizedText(text.tokens_N[begin:end], np.array([0, end - begin]), np.array([1]), 1, targets)
        batch = batch_of(PackedExamples(one, int(end - begin) - 1, "drop", pad=2))
        assert batch.attention_mask_BS.all()
        batches.append(replace(batch, document_ids_BS=None))
    return batches


def same(found, expected) -> None:
    assert found[0] == pytest.approx(expected[0], rel=2e-6)
    for name, gradient in expected[1].items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (found[1][name] - gradient).abs().max() < 2e-5 * scale, name


def test_loss_and_gradient_are_those_of_single_examples():
    rng = np.random.default_rng(0)
    text = tokenised([(rng.random(n) < 0.5).tolist() for n in rng.integers(3, 19, size=12)])
    packed = batch_of(PackedExamples(text, 20, "drop", pad=2))
    assert len(packed.input_ids_BS) < 9, "several examples share a block"
    assert (~packed.attention_mask_BS).any()
    # The balance loss looks at a whole batch, so examples one at a time are compared without it.
    same(gradients([packed], router_aux_loss_coef=0), gradients(alone(text), router_aux_loss_coef=0))
    singles = batch_of(OnePerBlock(text, 20, "drop", pad=2))
    assert len(singles.input_ids_BS) == 12
    same(gradients([packed]), gradients([singles]))
    order = torch.randperm(len(packed.input_ids_BS), generator=torch.Generator().manual_seed(1))
    runs_B = None if packed.runs_B is None else tuple(packed.runs_B[i] for i in order.tolist())
    shuffled = replace(packed._map(lambda tensor: tensor[order]), runs_B=runs_B)
    parts = [shuffled.rows(i, i + 1) for i in range(len(order))]
    same(gradients(parts, router_aux_loss_coef=0), gradients([packed], router_aux_loss_coef=0))


class OnePerBlock(PackedExamples):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self._ends = np.arange(1, len(self._documents) + 1)


@pytest.fixture
def chat_config(make_config, tokenizer, tmp_path):
    """40 rows of which one is over-long, in a chat.jsonl, with the session's tokenizer."""
    tokenizer.save_pretrained(tmp_path / "own")

    def make(rows: list[tuple[str, str]] | None = None, **data):
        rows = rows or [*((f"the {i}", f"router sends {i}") for i in range(39)), ("x1 " * 60, "def")]
        lines = "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows)
        (tmp_path / "chat.jsonl").write_text(lines)
        source = {"type": "files", "path": str(tmp_path / "chat.jsonl"), "content": "chat"}
        return make_config(
            data.pop("sources", [source]),
            tokenizer={"path": str(tmp_path / "own")},
            model={"vocab_size": None},
            data={"sequence_length": 64, "validation_fraction": 0.2, **data},
        )

    return make


def loaded(config, tmp_path):
    return load_data(config, build_tokenizer(config, tmp_path / "run/tokenizer"), show_progress=False)


def test_rows_are_learned_or_held_out_and_the_order_is_a_function_of_the_position(chat_config, tmp_path):
    config = chat_config()
    data = loaded(config, tmp_path)
    train, held_out = data.statistics
    assert train.documents + held_out.documents == 40
    assert 4 <= held_out.documents <= 10
    assert train.dropped + held_out.dropped == 1
    assert train.truncated == held_out.truncated == 0
    again = loaded(config, tmp_path)  # from the cache
    for start in (0, 3, 11):
        assert torch.equal(data.train.rows(start, 4).input_ids_BS, again.train.rows(start, 4).input_ids_BS)
    learned, held = spoken(data.train.sources), spoken(data.validation.sources)
    assert not learned & held
    assert len(learned | held) == 39
    cut = loaded(chat_config(overlong="truncate"), tmp_path)
    assert sum(part.dropped + part.truncated for part in cut.statistics) == 1
    shorter = loaded(chat_config(sequence_length=30), tmp_path)
    assert shorter.train.sources[0].sequence_length == 30


def spoken(sources) -> set[tuple[int, ...]]:
    batch = batch_of(sources[0])
    return {
        tuple(ids[documents == nth].tolist())
        for ids, documents in zip(batch.input_ids_BS, batch.document_ids_BS)
        for nth in documents[documents >= 0].unique()
    }


def test_text_and_chat_mix_by_weight_and_validate_apart(chat_config, tmp_path, make_text):
    (tmp_path / "text.txt").write_text("".join(make_text(i) for i in range(50)))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "the 1", "completion": "router sends 1"}) + "\n")
    chat = {"type": "files", "path": str(tmp_path / "chat.jsonl"), "content": "chat"}
    sources = [{**chat, "weight": 3}, {"type": "files", "path": str(tmp_path / "text.txt"), "weight": 1}]
    data = loaded(chat_config(sources=sources, validation_sources=[{**chat, "path": str(held_out)}]), tmp_path)
    source, _ = data.train.locate(0, 400)
    assert (source == 0).mean() == pytest.approx(0.75, abs=0.01)
    assert data.train.rows(0, 16).labels_BS.shape == (16, 64)
    assert data.statistics[0].documents == 39, "what is held out is not learned"
    assert data.validation.num_targets == data.validation.batches(micro_batch_size=1)[0].num_targets
    assert data.validation.bits_per_byte(1.0) == pytest.approx(
        data.validation.num_targets / np.log(2) / len("router sends 1")
    )


def test_evaluation_of_files_scores_the_answers(tokenizer, tmp_path):
    from test_chat import MIXTRAL, with_template

    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": "the", "completion": "router"}) + "\n")
    blocks = load_evaluation(
        str(tmp_path / "chat.jsonl"), with_template(tokenizer, MIXTRAL), sequence_length=64, chat=True
    )
    assert blocks.num_targets == len(tokenizer.encode("router", add_special_tokens=False)) + 1
    assert blocks.bytes_per_token * blocks.num_targets == pytest.approx(len("router"))


def test_few_rows_are_not_cut_in_two(chat_config, tmp_path):
    config = chat_config([("a", "long " * 9), ("b", "c")], validation_fraction=0.01)
    train, held_out = loaded(config, tmp_path).statistics
    assert (train.documents, held_out.documents) == (1, 1)
    with pytest.raises(UserError, match="holds one example, which cannot be both learned and held out"):
        loaded(chat_config([("a", "b")]), tmp_path)


def test_a_source_with_nothing_left_is_refused(chat_config, tmp_path):
    rows = [(f"the {i} " * 30, "def") for i in range(20)]
    with pytest.raises(UserError, match=r"sequence_length=64: of data\.sources\.0 all \d+ examples that are learned"):
        loaded(chat_config(rows), tmp_path)
    with pytest.raises(UserError, match=r"are longer, so none is left: raise it$"):
        loaded(chat_config(rows, overlong="truncate"), tmp_path)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "the " * 90, "completion": "a"}) + "\n")
    validation = [{"type": "files", "path": str(held_out), "content": "chat"}]
    with pytest.raises(UserError, match=r"of data\.validation_sources\.0 all 1 examples that are held out are longer"):
        loaded(chat_config(validation_sources=validation), tmp_path)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"isolate_documents": False}, "would let chat examples attend to each other"),
        ({"sources": [{"type": "python_stdlib", "content": "chat"}]}, "does not apply to python_stdlib"),
        ({"sources": [{"type": "files", "path": "x", "content": "chat", "format": "text"}]}, "has no rows"),
        ({"sources": [{"type": "files", "path": "x"}], "overlong": "truncate"}, "applies to no source"),
        ({"sources": [{"type": "files", "path": "x"}], "chat_template": "mixtral"}, "applies to no source"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(chat_config, data, sentence):
    with pytest.raises(ValueError, match=sentence):
        chat_config(**data)


def test_mixed_blocks_have_one_shape(random_blocks):
    text = tokenised([[False, True, True], [False, True]])
    blocks = TrainBlocks([PackedExamples(text, 16, "drop", pad=2), random_blocks([20, 30], 16)], None, 0)
    assert blocks.rows(0, len(blocks)).document_ids_BS.shape == (5, 16)
    assert ValidationBlocks([PackedExamples(text, 16, "drop", pad=2)]).num_targets == 3

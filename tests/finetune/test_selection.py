"""What is trained, by name, and the sentences that tell it or refuse it."""

import math

import pytest
from support.training import MODEL, config

from moe_llm.config import ModelConfig
from moe_llm.errors import UserError
from moe_llm.families.hf import parameter_shapes
from moe_llm.finetune.selection import describe, part_of, trained_names


def chosen(**finetune):
    return config(1, 1, 1, finetune=finetune)


@pytest.mark.parametrize(
    ("train", "count"),
    [
        ("all", 21),
        ("experts", 4),
        ("router", 2),
        ("attention", 8),
        (["lm_head.*"], 1),
        (["*.0.self_attn.?_proj.weight", "*norm*"], 9),
    ],
)
def test_parts_and_patterns(train, count):
    names = trained_names(chosen(train=train))
    assert len(names) == count
    order = list(parameter_shapes(ModelConfig(**MODEL)))
    assert names == sorted(names, key=order.index)


def test_the_sentence_counts_what_is_trained():
    counts = ModelConfig(**MODEL).parameter_counts()
    total = sum(counts.values())
    assert describe(chosen(train="experts")) == (
        f"training experts ({counts['experts']:,}): {counts['experts']:,} of {total:,} parameters "
        f"({counts['experts'] / total:.2%}) in 4 of 21 tensors; all else stays as it is"
    )
    assert f"training experts 1, 3 ({counts['experts'] // 2:,}): " in describe(chosen(train="experts", experts=[3, 1]))
    shapes = parameter_shapes(ModelConfig(**MODEL))
    by_part = {part: sum(math.prod(s) for n, s in shapes.items() if part_of(n) == part) for part in counts}
    assert by_part == counts


@pytest.mark.parametrize(
    ("finetune", "words"),
    [
        ({"trainable": ["*.mlp.gat.*"]}, r"finetune\.trainable='\*\.mlp\.gat\.\*' matches no parameter"),
        ({"trainable": ["lm_head.*", "nothing"]}, r"finetune\.trainable='nothing' matches no parameter"),
        ({"trainable": "experts", "experts": [1, 4]}, r"finetune\.experts=\[1, 4\] names expert 4, .* from 0 to 3"),
        ({"trainable": "all", "experts": [-1]}, r"names expert -1"),
        ({"trainable": "router", "experts": [1]}, r"leaves nothing to train of finetune\.trainable='router'"),
    ],
)
def test_what_names_nothing_is_refused(finetune, words):
    with pytest.raises(UserError, match=words):
        trained_names(chosen(**finetune))


@pytest.mark.parametrize("train", ["expert", [], [""], 3, None])
def test_what_is_no_part_is_refused(train):
    with pytest.raises(UserError, match=r"^finetune\.trainable=.* names no part of the model: use all, experts"):
        chosen(train=train)

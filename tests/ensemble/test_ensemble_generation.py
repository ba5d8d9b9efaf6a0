"""The ensemble inside generate(): greedy, sampling, beams with and without the members' caches, streaming."""

import pytest
import torch
from ensemble_fakes import build, checkpoint, log_probs, members
from merge.merge_fakes import WORDS
from transformers import AutoModelForCausalLM, TextIteratorStreamer
from transformers.cache_utils import DynamicCache

from moe_llm.ensemble.kv_cache import CachedMember
from moe_llm.ensemble.models import active_parameters, load_models
from moe_llm.ensemble.processor import EnsembleLogitsProcessor, generate
from moe_llm.ensemble.recipe import parse_recipe
from moe_llm.errors import UserError

PROMPTS = ["the cat sat", "dog", "the mat and the dog"]
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "sampled beams": {"num_beams": 3, "do_sample": True},
}
LENGTH = {"max_new_tokens": 9, "min_new_tokens": 9, "pad_token_id": 2}


def prompts(ensemble, texts=PROMPTS):
    tokenizer = ensemble.main.tokenizer
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)


def generated(ensemble, way: str, use_cache: bool = True, **options) -> torch.Tensor:
    torch.manual_seed(4)
    return generate(ensemble, prompts(ensemble), use_cache, **WAYS[way], **{**LENGTH, **options})


@pytest.mark.parametrize("way", WAYS)
def test_one_member_is_the_model_itself(models, way):
    ensemble = build("linear", members(models["b"]))
    alone = AutoModelForCausalLM.from_pretrained(models["b"])
    torch.manual_seed(4)
    expected = alone.generate(**prompts(ensemble), **WAYS[way], **LENGTH)
    assert torch.equal(generated(ensemble, way), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_of_all_for_the_first_is_the_first(models, way):
    alone = build("linear", members(models["a"]))
    both = build("linear", members(models["a"], models["b"], weight=[1, 0]))
    assert torch.equal(generated(both, way), generated(alone, way))
    tilted = build("linear", members(models["a"], models["b"], weight=[0, 1]))
    second = build("linear", members(models["b"]))
    assert torch.equal(generated(tilted, way), generated(second, way))
    assert not torch.equal(generated(alone, way), generated(second, way))


@pytest.mark.parametrize(
    ("method", "columns", "keys", "formula"),
    [
        ("linear", {"weight": [1, 3]}, {}, lambda a, b: 0.25 * a.exp() + 0.75 * b.exp()),
        ("log_linear", {"weight": [1.5, -0.5]}, {}, lambda a, b: (1.5 * a - 0.5 * b).softmax(-1)),
        ("experts", {"role": ["core", "positive"]}, {"lambda": 0.5}, lambda a, b: (0.5 * a + 0.5 * b).softmax(-1)),
        ("experts", {"role": ["core", "negative"]}, {"lambda": 2}, lambda a, b: (3 * a - 2 * b).softmax(-1)),
        ("experts", {"role": ["positive", "core"]}, {"lambda": 2}, lambda a, b: (2 * a - b).softmax(-1)),
    ],
)
def test_each_step_is_the_formula(models, method, columns, keys, formula):
    ensemble = build(method, members(models["a"], models["b"], **columns), **keys)
    inputs = prompts(ensemble, PROMPTS[:1])
    found = generate(ensemble, inputs, **WAYS["greedy"], max_new_tokens=6, output_scores=True, pad_token_id=2,
                     return_dict_in_generate=True)  # fmt: skip
    start = inputs["input_ids"].shape[1]
    a, b = (log_probs(models[name], found.sequences)[0] for name in "ab")
    for step, scores in enumerate(found.scores):
        expected = formula(a[start + step - 1], b[start + step - 1])
        torch.testing.assert_close(scores[0].exp(), expected, rtol=1e-4, atol=1e-5)
        assert int(found.sequences[0, start + step]) == int(expected.argmax())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mixed", [("a", "b"), ("b", "a", "c")])
def test_cached_is_uncached(models, way, mixed, monkeypatch):
    moves = []
    reorder = DynamicCache.reorder_cache
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda self, rows: (moves.append(rows), reorder(self, rows)))
    ensemble = build("linear", members(*(models[name] for name in mixed)))
    cached = generated(ensemble, way, output_scores=True, return_dict_in_generate=True)
    assert any(not torch.equal(rows, rows.sort().values) for rows in moves) == ("beams" in way)
    plain = generated(ensemble, way, use_cache=False, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(cached.sequences, plain.sequences)
    for one, other in zip(cached.scores, plain.scores):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_follower_reads_each_token_once_and_follows_its_rows(models):
    [model] = load_models(parse_recipe({"method": "linear", "members": members(models["b"])}).members)
    follower = CachedMember(model)
    ids = torch.randint(3, 11, (4, 6), generator=torch.Generator().manual_seed(0))

    def check(rows: torch.Tensor, read: int) -> None:
        before = follower.forwards
        found = follower.next_logits(rows)
        torch.testing.assert_close(found.log_softmax(-1), log_probs(models["b"], rows)[:, -1], rtol=1e-4, atol=1e-5)
        assert follower.forwards - before == read

    check(ids, 24)
    ids = torch.cat([ids[[2, 0, 0, 3]], torch.tensor([[3], [4], [5], [6]])], 1)
    check(ids, 4)  # moved, doubled, dropped
    ids = torch.cat([ids[[3, 3, 1, 0]], torch.tensor([[7, 8], [8, 7], [3, 3], [4, 4]])], 1)
    check(ids, 8)  # two tokens at once
    check(ids[:, :-1], 4 * 8)  # taken back: anew
    check(torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], 1), 4 * 9)  # another text: anew
    check(ids[:2], 2 * 9)  # fewer rows: anew


def test_prompts_that_differ_in_padding_alone_are_kept_apart(models):
    """Two beams of each change places, so that rows of the other prompt have the tokens that parents are known by."""
    [model] = load_models(parse_recipe({"method": "linear", "members": members(models["a"])}).members)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ids = torch.tensor([[2, 2, 3, 4, word] for word in (5, 6, 5, 6)])
    follower = CachedMember(model, None, mask)
    follower.next_logits(ids)
    ids = torch.cat([ids[[1, 0, 3, 2]], torch.tensor([[7], [8], [7], [8]])], 1)
    found = follower.next_logits(ids).log_softmax(-1)
    assert follower.forwards == 4 * 5 + 4
    expected = [log_probs(models["a"], ids[r : r + 1, 2 if r < 2 else 0 :])[0, -1] for r in range(4)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_what_was_forbidden_stays_forbidden(models):
    ensemble = build("linear", members(models["a"], models["b"]))
    free = generated(ensemble, "greedy")
    word = int(free[0, -1])
    found = generated(ensemble, "greedy", bad_words_ids=[[word]])
    assert word in free[:, -9:]
    assert word not in found[:, -9:]


def test_tokens_stream_as_they_come(models):
    ensemble = build("linear", members(models["a"], models["b"]))
    inputs = prompts(ensemble, PROMPTS[:1])
    whole = generate(ensemble, inputs, **WAYS["greedy"], **LENGTH)
    streamer = TextIteratorStreamer(ensemble.main.tokenizer, skip_prompt=True, timeout=20)
    generate(ensemble, inputs, streamer=streamer, **WAYS["greedy"], **LENGTH)
    pieces = list(streamer)
    assert "".join(pieces) == ensemble.main.tokenizer.decode(whole[0, -9:])
    assert len([piece for piece in pieces if piece]) > 3


def test_members_of_one_checkpoint_are_loaded_and_run_once(models, monkeypatch):
    from moe_llm.ensemble import models as module

    loaded = []
    load = module.load_causal_lm
    monkeypatch.setattr(module, "load_causal_lm", lambda *args: (loaded.append(args), load(*args))[1])
    a, b = models["a"], models["b"]
    ensemble = build("linear", members(a, b, f"{a}/../a", b, weight=[1, 1, 1, 1]))
    assert len(loaded) == len(ensemble.models) == 2
    assert ensemble.rule.weights == (0.5, 0.5)
    twice = build("linear", members(a, b))
    assert torch.equal(generated(ensemble, "beams"), generated(twice, "beams"))
    assert len(build("linear", [{"model": a}, {"model": a, "dtype": "bf16"}]).models) == 2


def test_a_cascade_asks_where_the_small_one_is_unsure(models):
    def run(threshold):
        ensemble = build("cascade", members(models["c"], models["b"], role=["small", "large"]), threshold=threshold)
        processor = EnsembleLogitsProcessor(ensemble)
        inputs = prompts(ensemble, PROMPTS[:1])
        found = ensemble.main.model.generate(**inputs, logits_processor=[processor], **WAYS["greedy"], **LENGTH)
        return found, processor

    alone = {name: generated(build("linear", members(models[name])), "greedy")[:1] for name in "cb"}
    never, processor = run(0.0)
    assert (processor.asked, processor.rows) == (0, 9)
    assert processor._followers[1].forwards == 0
    always, processor = run(1.0)
    assert processor.asked == 9
    assert torch.equal(never[0, -9:], alone["c"][0, -9:])
    assert torch.equal(always[0, -9:], alone["b"][0, -9:])
    start = always.shape[1] - 9
    some, processor = run(0.5)
    assert 0 < processor.asked < 9
    small, large = (log_probs(models[name], some)[0] for name in "cb")
    for at in range(start, some.shape[1]):
        judge = large if small[at - 1].exp().max() < 0.5 else small
        assert int(some[0, at]) == int(judge[at - 1].argmax())
    assert processor._followers[1].forwards <= some.shape[1] - 1


def test_longer_than_a_member_reads_is_refused(models, tmp_path):
    short = checkpoint(tmp_path / "short", "llama", 5, words=WORDS, max_position_embeddings=8)
    ensemble = build("linear", members(models["a"], short))
    with pytest.raises(UserError, match=r"max_position_embeddings=8 of .*short"):
        generate(ensemble, prompts(ensemble, PROMPTS[:1]), **WAYS["greedy"], **LENGTH)


def test_active_parameters_are_those_of_the_configuration(models):
    from moe_llm.checkpoint.pretrained import MoEForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["b"])
    assert active_parameters(model) == MoEForCausalLM.from_pretrained(models["b"]).config.num_params(active=True)
    dense = AutoModelForCausalLM.from_pretrained(models["a"])
    assert active_parameters(dense) == sum(p.numel() for p in dense.parameters())

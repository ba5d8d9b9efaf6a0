"""generate and chat: with the cache of keys and values or without, in batches or one by one, the same tokens."""

import copy
import io
import shutil
import sys

import pytest
import torch
from support import runs
from support.families import CASES
from transformers import AutoModelForCausalLM

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.cli import main
from moe_llm.config import Config, ModelConfig
from moe_llm.config.routers import ROUTER_SETTINGS
from moe_llm.data.tokenizer import build_tokenizer, save_tokenizer
from moe_llm.inference.chat import Conversation
from moe_llm.inference.generate import generate_texts, load
from moe_llm.model.init import build_model
from moe_llm.model.moe import routers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ["mixtral", "qwen2", "qwen3", "olmoe", "glm4", "deepseek2", "deepseek3", "gpt-oss"]
ROUTERS: dict[str, dict] = {
    "top_p": {},
    "lory": {"segment_length": 4},
    "multi_head": {"heads": 2},
    "soft_moe": {"slots_per_expert": 1, "segment_length": 4},
    "balanced": {},
    "expert_choice": {},
    "transformer": {},
    "hierarchical": {"groups": 2},
    "attention": {},
    "reinforce": {},
}
PROMPTS = ["the router", "experts answer the tokens", "a"]
GREEDY = {"max_new_tokens": 6, "temperature": 0.0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizer")
    text = runs.write_text(root / "text.txt")
    raw = {
        "model": {"vocab_size": 290},
        "data": {"sources": [{"type": "files", "path": str(text)}], "cache_dir": str(root / "cache")},
        "train": {"max_steps": 1},
    }
    made = build_tokenizer(Config.model_validate(raw), root / "made")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


@torch.no_grad()
def whole_characters(model, tokenizer) -> None:
    """Let the model prefer pieces to single bytes, of which a random one makes no text."""
    for token, index in tokenizer.get_vocab().items():
        if token.startswith("<0x"):
            model.lm_head.weight[index] = 0.0


def router_checkpoint(kind: str, tokenizer, directory):
    model = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 1 if kind in ("lory", "soft_moe") else 2,
        "max_position_embeddings": 128, "initializer_range": 0.3, "router": {"type": kind, **ROUTERS[kind]},
    }  # fmt: skip
    made = build_model(ModelConfig.model_validate(model), seed=1)
    own = MoEForCausalLM(made.config)
    own.load_state_dict(made.state_dict())
    whole_characters(own, tokenizer)
    own.save_pretrained(directory, tokenizer=tokenizer)
    return directory


def family_checkpoint(name: str, tokenizer, directory):
    config = copy.deepcopy(CASES[name])
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    whole_characters(model, tokenizer)
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    return directory


@pytest.fixture(scope="module", params=[*FAMILIES, *ROUTERS])
def checkpoint(request, tokenizer, tmp_path_factory):
    make = router_checkpoint if request.param in ROUTERS else family_checkpoint
    return make(request.param, tokenizer, tmp_path_factory.mktemp("model"))


def test_cached_batched_and_single_continuations_are_the_same(checkpoint):
    cached = generate_texts(checkpoint, PROMPTS, **GREEDY, batch_size=2, say=lambda _: None)
    assert cached == generate_texts(checkpoint, PROMPTS, **GREEDY, use_cache=False, batch_size=1, say=lambda _: None)
    assert [text.startswith(prompt) for text, prompt in zip(cached, PROMPTS)] == [True] * 3
    assert cached != PROMPTS


def test_a_conversation_keeps_its_cache_and_answers_as_one_read_anew(checkpoint):
    pieces: list[str] = []
    loaded = load(checkpoint, say=lambda _: None)
    kept, anew = (Conversation(loaded, max_new_tokens=5, use_cache=cache, temperature=0.0) for cache in (True, False))
    for turn in ("the router", "and the experts"):
        pieces.clear()
        answer = kept.answer(turn, pieces.append)
        assert answer == anew.answer(turn)
        assert "".join(pieces).strip() == answer.strip()
    assert [turn["role"] for turn in kept.turns] == ["user", "assistant"] * 2
    if loaded.caches:
        assert kept._held, "the cache is not kept"


@pytest.fixture(scope="module")
def mixtral(tokenizer, tmp_path_factory):
    return family_checkpoint("mixtral", tokenizer, tmp_path_factory.mktemp("mixtral"))


def test_a_continuation_ends_before_the_first_text_that_stops_it(mixtral):
    [whole] = generate_texts(mixtral, PROMPTS[:1], max_new_tokens=12, temperature=0.0)
    new = whole.removeprefix(PROMPTS[0])
    assert len(new) > 4
    stop = new[3:5]
    [cut] = generate_texts(mixtral, PROMPTS[:1], max_new_tokens=12, temperature=0.0, stop=[stop, "never seen"])
    assert cut == PROMPTS[0] + new[: new.index(stop)]


def test_a_seed_draws_the_same_texts_again_and_another_one_others(mixtral):
    texts = [generate_texts(mixtral, PROMPTS, max_new_tokens=8, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_chat_on_the_command_line_streams_answers_and_takes_commands(mixtral, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the router\n/reset\nthe router\n/what\n\n/exit\nunread\n"))
    assert main(["chat", str(mixtral), "--max-new-tokens", "4", "--temperature", "0"]) == 0
    first, _, rest = capsys.readouterr().out.partition("(a new conversation)\n")
    assert first.strip()
    assert rest.startswith(first)
    assert "(no such command: /what;" in rest


def test_chat_without_a_template_is_a_sentence(mixtral, tmp_path, capsys):
    bare = shutil.copytree(mixtral, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    assert main(["chat", str(bare)]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_a_router_of_ones_own_generates_and_keeps_to_its_limit(tokenizer, tmp_path, monkeypatch):
    """The class of docs/guides/own-router.md: no other program knows it, so that our own model answers."""
    page = (runs.ROOT / "docs/guides/own-router.md").read_text(encoding="utf-8")
    monkeypatch.setattr(routers, "ROUTERS", dict(routers.ROUTERS))
    known = dict(ROUTER_SETTINGS)
    try:
        exec(page.split("```python\n")[1].split("```")[0], {"__name__": "my_router"})
        monkeypatch.setitem(ROUTERS, "sigmoid", {})
        checkpoint = router_checkpoint("sigmoid", tokenizer, tmp_path / "model")
        texts = generate_texts(checkpoint, PROMPTS, **GREEDY, batch_size=2, say=lambda _: None)
        assert all(text.startswith(prompt) for text, prompt in zip(texts, PROMPTS))
        assert texts == [generate_texts(checkpoint, [p], **GREEDY, say=lambda _: None)[0] for p in PROMPTS]
    finally:
        ROUTER_SETTINGS.clear()
        ROUTER_SETTINGS.update(known)

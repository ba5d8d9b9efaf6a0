"""A conversation with a checkpoint, whose cache of keys and values is kept from turn to turn."""

from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any

import torch

from moe_llm.data.chat_template import own_template, render_prompt
from moe_llm.data.tokenizer import end_token_ids
from moe_llm.ensemble.causal_lm import read_prompt, refuse_no_number, said, sampling
from moe_llm.errors import UserError
from moe_llm.inference.generate import Loaded

HELP = "/reset forgets the conversation, /system TEXT begins one with a system turn, /exit ends"


class Conversation:
    """Turns so far, and the model's cache of the tokens that they have in common with what comes next.

    Raises:
        UserError: the tokenizer has no chat template, or the router is defined elsewhere.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        use_cache: bool = True,
        **how: float,
    ):
        if own_template(loaded.tokenizer) is None:
            raise UserError(
                f"the tokenizer of {loaded.name} has no chat template: save one beside it, or use moe-llm generate"
            )
        if not hasattr(loaded.model, "generate"):
            raise UserError(f"{loaded.name} has a router that is defined elsewhere: use moe-llm generate --chat")
        self._loaded, self._limit, self._how = loaded, max_new_tokens, how
        self._cached = use_cache and loaded.caches
        self.turns: list[dict[str, str]] = []
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Begin anew, with a system turn or without."""
        self.turns = [{"role": "system", "content": system}] if system else []
        self._cache: Any = None
        self._held: list[int] = []  # tokens whose keys and values the cache holds

    @torch.no_grad()
    def answer(self, content: str, write: Callable[[str], None] | None = None) -> str:
        """The answer to a user's turn; both become part of the conversation.

        Args:
            write: is given the answer piece by piece as it comes about.

        Raises:
            UserError: the template refuses the turns, or the conversation is longer than the model's positions.
        """
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        turns = [*self.turns, {"role": "user", "content": content}]
        text = render_prompt(tokenizer, turns, "the conversation")
        ids = read_prompt(tokenizer, text, self._loaded.rows, chat=True)["input_ids"][0].tolist()
        longest, limit = self._loaded.longest, self._limit
        if longest is not None:
            if len(ids) > longest:
                raise UserError(
                    f"the conversation has {len(ids)} tokens, and {self._loaded.name!r} only {longest} positions: /reset"
                )
            limit = min(limit, longest + 1 - len(ids))
        ids_BS = torch.tensor([ids], device=model.device)
        streamer = _streamer(tokenizer, write) if write is not None else None
        output = model.generate(
            input_ids=ids_BS,
            attention_mask=torch.ones_like(ids_BS),
            max_new_tokens=limit,
            use_cache=self._cached,
            return_dict_in_generate=True,
            streamer=streamer,
            logits_processor=[refuse_no_number],
            **({"past_key_values": self._cache_of(ids)} if self._cached else {}),
            **sampling(self._how.get("temperature", 0.8), self._how.get("top_p", 0.95)),
        )
        whole = output.sequences[0].tolist()
        if self._cached:
            self._cache = output.past_key_values
            self._held = whole[: self._cache.get_seq_length()]
        ends = end_token_ids(tokenizer)
        new = list(takewhile(lambda token: token not in ends, whole[len(ids) :]))
        answer = said(tokenizer, torch.tensor([*ids, *new]), len(ids))
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def _cache_of(self, ids: list[int]) -> Any:
        """The cache, cut back to the tokens that these begin with; a new one where it cannot be cut."""
        from transformers import DynamicCache

        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._held, ids[:-1])))
        sliding = self._cache is not None and any(getattr(self._cache, "is_sliding", ()))
        if self._cache is None or (sliding and common < len(self._held)):
            return DynamicCache(config=self._loaded.model.config)
        if common < len(self._held):
            self._cache.crop(common - len(self._held))  # as many as are to go, below zero
        return self._cache


def _streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def talk(conversation: Conversation, lines: Iterable[str], write: Callable[[str], None]) -> None:
    """Answer each line of a user's until there is no further one; a line that begins with / is for the program.

    Args:
        write: is given what is to be shown, as it comes about.
    """
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if word == "/exit":
            return
        if word in ("/reset", "/system"):
            conversation.reset(rest.strip() if word == "/system" else None)
            write("(a new conversation)\n")
        elif word.startswith("/"):
            write(f"(no such command: {word}; {HELP})\n")
        elif line.strip():
            try:
                conversation.answer(line.strip(), write)
            except UserError as error:  # the conversation goes on as it was
                write(f"({error})")
            write("\n")

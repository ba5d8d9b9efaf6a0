"""A member beside generate(), with a KV cache of its own.

generate() hands a LogitsProcessor the rows as they are and says nothing of how they came about: beams change places,
die and multiply between two calls, and the main model's cache is reordered out of sight. A row's parent is known by
its tokens: it is the row of the call before that had the same prefix. Rows with one prefix have one state, so that any
of them will do. Where a row has no parent (another text, or tokens taken back), everything is computed anew.

Shapes: R rows, B prompts, P prompt tokens, T tokens, U tokens of the member, W its vocabulary.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from moe_llm.ensemble.models import Model
from moe_llm.ensemble.vocabulary import Translated, Translator
from moe_llm.errors import UserError


class CachedMember:
    """Next-token logits of a member for whatever rows it is shown.

    Args:
        translator: None where the member has the main model's vocabulary.
        prompt_mask_BP: False on the padding of prompts; rows are the prompts', each repeated. None: no padding.
        use_cache: False computes every row from its beginning, each time.

    forwards: tokens that the model has read, padding included.
    """

    def __init__(
        self, member: Model, translator: Translator | None = None, prompt_mask_BP: Tensor | None = None,
        use_cache: bool = True,
    ):  # fmt: skip
        self.member, self.translator, self.use_cache = member, translator, use_cache and member.caches
        self._prompt_mask_BP = None if prompt_mask_BP is None else prompt_mask_BP.bool().cpu()
        self._takes = inspect.signature(member.model.forward).parameters
        self.forwards = 0
        self._forget()

    def _forget(self) -> None:
        self._ids_RT: Tensor | None = None
        self._mask_RU: Tensor | None = None
        self._cache: Any = None

    @torch.no_grad()
    def next_logits(self, ids_RT: Tensor) -> Tensor:
        """(R, W) logits of the token after each row.

        Raises:
            UserError: the rows are longer than the member is meant for.
        """
        ids_RT = ids_RT.cpu()
        seen = self._follow(ids_RT)
        mask_RT = self._token_mask(ids_RT)
        new = translate(self.translator, ids_RT[:, seen:], mask_RT[:, seen:])
        mask_RU = new.mask_RU if self._mask_RU is None else torch.cat([self._mask_RU, new.mask_RU], 1)
        check_length(self.member, mask_RU)
        logits_RUW, cache = self._forward(new, mask_RU)
        if self.use_cache and cache is not None and not _spoilt(cache, new.mask_RU):
            self._ids_RT, self._mask_RU, self._cache = ids_RT, mask_RU, cache
        else:
            self._forget()
        last_R = new.ends_RT[:, -1] - (new.ids_RU.shape[1] - logits_RUW.shape[1])
        return logits_RUW[torch.arange(len(ids_RT)), last_R.to(logits_RUW.device)]

    def _forward(self, new: Translated, mask_RU: Tensor) -> tuple[Tensor, Any]:
        device, length = self.member.device, new.ids_RU.shape[1]
        inputs: dict[str, Any] = {"attention_mask": mask_RU.long().to(device)}
        if "position_ids" in self._takes:
            positions_RU = (mask_RU.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
            inputs["position_ids"] = positions_RU.to(device)
        if "use_cache" in self._takes:
            inputs["use_cache"] = self.use_cache
        if self._cache is not None:
            inputs["past_key_values"] = self._cache
        if "logits_to_keep" in self._takes and bool((new.ends_RT[:, -1] == length - 1).all()):
            inputs["logits_to_keep"] = 1
        output = self.member.model(input_ids=new.ids_RU.to(device), **inputs)
        self.forwards += new.ids_RU.numel()
        return output.logits, getattr(output, "past_key_values", None)

    def _follow(self, ids_RT: Tensor) -> int:
        """How many tokens of the rows the cache holds, after giving each row its parent's state."""
        known_RT = self._ids_RT
        parents_R = None
        if known_RT is not None and known_RT.shape[0] == len(ids_RT) and known_RT.shape[1] < ids_RT.shape[1]:
            parents_R = self._parents(ids_RT[:, : known_RT.shape[1]])
        if parents_R is None or known_RT is None or self._mask_RU is None:
            self._forget()
            return 0
        if not torch.equal(parents_R, torch.arange(len(ids_RT))):
            self._cache.reorder_cache(parents_R.to(self.member.device))
            self._mask_RU = self._mask_RU[parents_R]
        return known_RT.shape[1]

    def _parents(self, prefix_RT: Tensor) -> Tensor | None:
        """The row of the call before that each row continues; None if there is one without."""
        rows = len(prefix_RT)
        assert self._ids_RT is not None, "there was a call before"
        if torch.equal(prefix_RT, self._ids_RT):
            return torch.arange(rows)
        prompt_R = torch.arange(rows) // self._repeats(rows)
        found = []
        for r in range(rows):
            # prompts that differ in their padding alone may have equal tokens, and have other states
            alike_R = torch.eq(self._ids_RT, prefix_RT[r]).all(1) & (prompt_R == prompt_R[r])
            if not alike_R.any():
                return None
            found.append(int(alike_R.int().argmax()))
        return torch.tensor(found)

    def _repeats(self, rows: int) -> int:
        """Rows of each prompt: beams, or answers asked for."""
        if self._prompt_mask_BP is None:
            return rows
        prompts = len(self._prompt_mask_BP)
        if rows % prompts:
            raise ValueError(f"{rows} rows are no multiple of the attention_mask's {prompts}: give generate()'s own")
        return rows // prompts

    def _token_mask(self, ids_RT: Tensor) -> Tensor:
        mask_RT = torch.ones_like(ids_RT, dtype=torch.bool)
        if self._prompt_mask_BP is not None:
            prompts_RP = self._prompt_mask_BP.repeat_interleave(self._repeats(len(ids_RT)), 0)
            mask_RT[:, : prompts_RP.shape[1]] = prompts_RP[:, : ids_RT.shape[1]]
        return mask_RT


def _spoilt(cache: Any, mask_RU: Tensor) -> bool:
    """Whether the running state of a recurrent layer has read what fills up shorter rows."""
    return any(getattr(cache, "is_linear", ())) and not bool(mask_RU[:, -1].all())


def translate(translator: Translator | None, ids_RT: Tensor, mask_RT: Tensor) -> Translated:
    """What a member reads for the main model's tokens, on the CPU."""
    if translator is not None:
        return translator.read(ids_RT, mask_RT)
    return Translated(ids_RT, mask_RT, torch.arange(ids_RT.shape[1]).expand_as(ids_RT))


def check_length(member: Model, mask_RU: Tensor) -> None:
    """Refuse what is longer than a member is meant for.

    Raises:
        UserError: so it is.
    """
    _check_tokens(member, int(mask_RU.sum(1).max()))


def room(member: Model, prompt: int, wanted: int) -> int:
    """How many tokens, `wanted` at most, may follow a prompt of so many; the last one is not read any more.

    Raises:
        UserError: the prompt alone is longer than the member is meant for.
    """
    _check_tokens(member, prompt)
    return wanted if member.longest is None else min(wanted, member.longest + 1 - prompt)


def _check_tokens(member: Model, tokens: int) -> None:
    if member.longest is not None and tokens > member.longest:
        raise UserError(
            f"the text of {tokens} tokens is longer than max_position_embeddings={member.longest} of {member.name}: "
            "give a shorter prompt, or a smaller --max-new-tokens"
        )

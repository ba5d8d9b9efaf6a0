"""Continue texts. transformers' `generate` does it, with a cache of keys and values, for every checkpoint whose model it
knows or whose modelling code lies beside the weights."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moe_llm.checkpoint.folder import check_checkpoint_directory
from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.checkpoint.safetensors_io import read_json
from moe_llm.data.documents import vocabulary_size
from moe_llm.data.tokenizer import end_token_ids, load_tokenizer
from moe_llm.ensemble.causal_lm import (
    as_prompt,
    generate_plainly,
    learned_positions,
    load_causal_lm,
    refuse_no_number,
    said,
    sampling,
)
from moe_llm.errors import UserError, require_package
from moe_llm.families.architectures import OWN
from moe_llm.families.hf import from_transformers_config
from moe_llm.model import quantized
from moe_llm.progress import progress

logger = logging.getLogger(__name__)

Bits = Literal["int8", "nf4"]

# these read earlier tokens anew, which no cache of keys and values holds
_WITHOUT_CACHE = ("soft_moe", "transformer")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint to generate with.

    model: of transformers, or of our modelling code for it; a `MoEForCausalLM` where its router is defined elsewhere.
    rows: of its embedding. caches: whether it can keep keys and values.
    """

    name: str
    model: Any
    tokenizer: Any
    rows: int
    caches: bool

    @property
    def longest(self) -> int | None:
        """Positions that it has learned an embedding for; None where there is no last one."""
        return None if isinstance(self.model, MoEForCausalLM) else learned_positions(self.model)


def load(
    checkpoint: str | Path, say: Callable[[str], None] | None = None, quantize_experts: Bits | None = None
) -> Loaded:
    """A checkpoint on the GPU, where there is one, that stops at its tokenizer's ends and nowhere else.

    Args:
        say: is given a sentence where generation routes otherwise than training did; None: it is logged.
        quantize_experts: hold the experts in 8 or 4 bits.

    Raises:
        UserError: the directory is no checkpoint, or a damaged one; or the package for fewer bits is missing.
    """
    if quantize_experts is not None:
        require_package("bitsandbytes", f"--quantize-experts {quantize_experts}")
    check_checkpoint_directory(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(checkpoint)
    file = Path(checkpoint) / "config.json"
    content, caches = read_json(file), True
    rows = content.get("vocab_size", vocabulary_size(tokenizer))
    if content.get("model_type") == OWN.model_type:
        router = from_transformers_config(content, str(file)).router
        caches = router.type not in _WITHOUT_CACHE
        if not router.causal:
            (say or logger.info)(
                f"model.router.type={router.type}: in training {router.looks_ahead}, evaluation and generation "
                f"{router.afterwards}"
            )
        if "auto_map" not in content or quantize_experts is not None:
            own = _packed(MoEForCausalLM.from_pretrained(checkpoint), quantize_experts).to(device)
            return Loaded(str(checkpoint), own, tokenizer, rows, caches=False)
    model = _packed(load_causal_lm(checkpoint), quantize_experts).to(device)
    generate_plainly(model, tokenizer)
    return Loaded(str(checkpoint), model, tokenizer, rows, caches and model.generation_config.use_cache is not False)


def generate(
    checkpoint: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool = False,
    quantize_experts: Bits | None = None,
    say: Callable[[str], None] | None = None,
) -> str:
    """The prompt and its continuation; temperature 0 takes the likeliest token each time.

    Args:
        chat: the prompt is a user's turn, put into the tokenizer's chat template; the answer alone is given.
        quantize_experts: hold the experts in 8 or 4 bits.
        say: is given a sentence where generation routes otherwise than training did; None: it is logged.

    Raises:
        UserError: the directory is no checkpoint, or a damaged one; the prompt is longer than its positions, or holds a
            token beyond its rows; or chat, and there is no template.
    """
    [text] = generate_texts(
        checkpoint,
        [prompt],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        quantize_experts=quantize_experts,
        say=say,
    )
    return text


def generate_texts(
    checkpoint: str | Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool = False,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    use_cache: bool = True,
    quantize_experts: Bits | None = None,
    say: Callable[[str], None] | None = None,
) -> list[str]:
    """Each prompt and its continuation, `batch_size` of them at once; see `generate`.

    Args:
        stop: texts at the first of which a continuation ends, without it.
        use_cache: keep keys and values of earlier tokens; the same tokens without it, more slowly.

    Raises:
        UserError: as `generate`; before anything is generated.
    """
    loaded = load(checkpoint, say, quantize_experts)
    asked = [_read(loaded, prompt, max_new_tokens, chat) for prompt in prompts]
    torch.manual_seed(seed)
    texts = []
    size = 1 if isinstance(loaded.model, MoEForCausalLM) else batch_size
    with progress("generating", len(asked)) as advance:
        for batch in (asked[at : at + size] for at in range(0, len(asked), size)):
            new = _new_tokens(loaded, batch, max_new_tokens, temperature, top_p, stop, use_cache)
            texts += [_text(loaded, read, ids, chat, stop) for read, ids in zip(batch, new)]
            advance(len(batch))
    return texts


def _read(loaded: Loaded, prompt: str, max_new_tokens: int, chat: bool) -> list[int]:
    """The tokens of a prompt, if the model has room for them."""
    ids = as_prompt(loaded.tokenizer, prompt, loaded.rows, chat, loaded.name)["input_ids"][0].tolist()
    if loaded.longest is not None and len(ids) > loaded.longest:
        raise UserError(
            f"the prompt has {len(ids)} tokens, and {loaded.name!r} only "
            f"max_position_embeddings={loaded.longest} positions: give a shorter prompt"
        )
    return ids


@torch.no_grad()
def _new_tokens(
    loaded: Loaded,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop: Sequence[str],
    use_cache: bool,
) -> list[list[int]]:
    """What follows each prompt, up to and with the token that ends it."""
    model, tokenizer, ends = loaded.model, loaded.tokenizer, end_token_ids(loaded.tokenizer)
    if isinstance(model, MoEForCausalLM):
        [ids] = prompts
        return [
            _continue(model, ids, max_new_tokens, temperature, top_p, ends, lambda new: _cut(tokenizer, ids, new, stop))
        ]
    width = max(map(len, prompts))
    if loaded.longest is not None:
        max_new_tokens = min(max_new_tokens, loaded.longest + 1 - width)  # the last token is not read again
    ids_BS = torch.tensor([[ends[0]] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    mask_BS = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    stops = {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
    output_BS = model.generate(
        input_ids=ids_BS,
        attention_mask=mask_BS,
        max_new_tokens=max_new_tokens,
        use_cache=use_cache and loaded.caches,
        logits_processor=[refuse_no_number],
        **sampling(temperature, top_p),
        **stops,
    )
    rows = output_BS[:, width:].tolist()
    return [row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))] for row in rows]


def _text(loaded: Loaded, read: list[int], new: list[int], chat: bool, stop: Sequence[str]) -> str:
    """The prompt with what follows, or with `chat` what follows alone, up to the first of the texts that stop it."""
    whole = torch.tensor([*read, *new])
    end = _cut(loaded.tokenizer, read, new, stop)
    answer = said(loaded.tokenizer, whole, len(read))
    before = "" if chat else said(loaded.tokenizer, whole, 0).removesuffix(answer)
    return before + answer[:end]


def _cut(tokenizer: Any, read: list[int], new: list[int], stop: Sequence[str]) -> int | None:
    """Where in the text of new tokens the first of the texts that stop it begins; None: nowhere."""
    answer = said(tokenizer, torch.tensor([*read, *new]), len(read)) if stop else ""
    return min((at for at in map(answer.find, stop) if at >= 0), default=None)


@torch.no_grad()
def _packed(model: Any, kind: Bits | None) -> Any:
    if kind is not None:
        quantized.quantize_experts(model, kind)
    return model


def _continue(
    model: MoEForCausalLM,
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    ends: list[int],
    stopped: Callable[[list[int]], int | None],
) -> list[int]:
    """New tokens, each from the whole text before it, as far as the model is meant for."""
    new: list[int] = []
    while len(new) < max_new_tokens and not (new and new[-1] in ends) and stopped(new) is None:
        text_BS = torch.tensor([[*ids, *new][-model.config.longest_text :]], device=model.lm_head.weight.device)
        logits_V = model(text_BS).logits[0, -1].float()
        if temperature == 0:
            new.append(int(logits_V.argmax()))
            continue
        probability_V, token_V = (logits_V / temperature).softmax(-1).sort(descending=True)
        kept_V = probability_V.cumsum(-1) - probability_V < top_p  # the likeliest that reach top_p together
        new.append(int(token_V[torch.multinomial(probability_V * kept_V, 1)]))
    return new

"""Any causal LM that transformers knows, from a directory, and how it is sampled from."""

import math
from pathlib import Path
from typing import Any

import torch

from moe_llm.checkpoint.safetensors_io import read_json
from moe_llm.checkpoint.weights import check_finite
from moe_llm.data.chat_template import own_template, render_prompt
from moe_llm.data.documents import check_rows, prompt_ids
from moe_llm.data.tokenizer import end_token_ids
from moe_llm.errors import UserError
from moe_llm.families.architectures import OWN
from moe_llm.progress import progress


@progress("loading the model")
def load_causal_lm(checkpoint: str | Path, dtype: torch.dtype | str = "auto", called: str = "checkpoint") -> Any:
    """A causal language model of transformers, or of our modelling code for it, on the CPU, in evaluation mode, every
    tensor from the checkpoint.

    Args:
        dtype: of the weights; `auto`: as stored.
        called: what the user calls it, for errors.

    Raises:
        UserError: it is damaged, of no architecture that transformers knows, or a tensor is missing, which
            transformers would draw at random.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from transformers.utils import logging

    _check_not_quantized(checkpoint, called)
    _check_numbers(checkpoint, called)
    logging.disable_progress_bar()
    unset_hf_deepspeed_config()  # under ZeRO-3 transformers would cut the model up among the ranks
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of what is missing, of which a sentence is told below
    try:
        model, info = _class_of(checkpoint, called).from_pretrained(
            checkpoint, config=_config_of(checkpoint), dtype=dtype, output_loading_info=True
        )
    except (
        OSError, ValueError, KeyError, TypeError, ZeroDivisionError, ImportError, RuntimeError, SafetensorError,
        StrictDataclassError,
    ) as error:  # fmt: skip
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{called}={str(checkpoint)!r} cannot be loaded, its config.json or model.safetensors is unusable "
            f"({reason}): use another checkpoint"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    lost = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if lost:
        raise UserError(
            f"{called}={str(checkpoint)!r} lacks {lost[0]}, or has it in another shape: "
            "use a causal language model's checkpoint"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            check_finite(parameter.detach(), name, Path(checkpoint))
    _take_any_width(model)
    return model.eval()


def _take_any_width(model: Any) -> None:
    """Have transformers compute experts one by one where its grouped products, which take rows of multiples of 16 bytes
    alone, would fail."""
    stacked = [p for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3]
    if any(size * p.element_size() % 16 for p in stacked for size in p.shape[1:]):
        model.set_experts_implementation("eager")


def _class_of(checkpoint: str | Path, called: str) -> Any:
    """The Auto class, or that of our own modelling code: of the package's copy of it, so that no code beside the
    weights is run."""
    file = Path(checkpoint) / "config.json"
    content = read_json(file) if file.is_file() else {}
    if content.get("model_type") != OWN.model_type:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM
    if "auto_map" not in content:
        raise UserError(
            f"{called}={str(checkpoint)!r} has a router that is defined elsewhere, which transformers' models do not "
            "know: use moe-llm generate or evaluate on it alone, or another checkpoint"
        )
    from moe_llm.families.remote_code.modeling_moe_llm import MoELLMForCausalLM

    return MoELLMForCausalLM


def _check_not_quantized(checkpoint: str | Path, called: str) -> None:
    """Refuse weights in 8 bits or fewer: the kernels for them are a GPU's."""
    file = Path(checkpoint) / "config.json"
    content = read_json(file) if file.is_file() else {}
    method = (content.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "mxfp4") and not torch.cuda.is_available():  # transformers unpacks mxfp4 where it must
        raise UserError(
            f"{called}={str(checkpoint)!r} is quantised ({method}), which needs a GPU: give a checkpoint in fp32, bf16 or "
            "fp16"
        )


def _check_numbers(checkpoint: str | Path, called: str) -> None:
    """Refuse numbers in config.json with which transformers makes a model, and fails or gives NaN when it is asked."""
    file = Path(checkpoint) / "config.json"
    content = read_json(file) if file.is_file() else {}
    bad = next((key for key, value in content.items() if isinstance(value, float) and not math.isfinite(value)), None)
    experts = next((content[key] for key in _EXPERTS if isinstance(content.get(key), int)), None)
    active = content.get("num_experts_per_tok")
    if experts is not None and isinstance(active, int) and not 0 < active <= experts:
        bad = "num_experts_per_tok"
    if bad is not None:
        raise UserError(
            f"{called}={str(checkpoint)!r}: {bad}={content[bad]} in its config.json is not possible: correct it, or use "
            "another checkpoint"
        )


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _config_of(checkpoint: str | Path) -> Any:
    """transformers' configuration with the width of a head said: some of its rotary embeddings (yarn, dynamic, longrope)
    fail where config.json has it as null, one of them while the configuration is made. None where it says nothing of the
    kind."""
    from transformers import AutoConfig

    content = read_json(Path(checkpoint) / "config.json") if (Path(checkpoint) / "config.json").is_file() else {}
    if content.get("model_type") == OWN.model_type or content.get("head_dim", 0) is not None:
        return None
    width = content["hidden_size"] // content["num_attention_heads"]
    return AutoConfig.for_model(**(content | {"head_dim": width}))


def sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """generate()'s options for a temperature, 0 meaning the likeliest token, and top-p. Without top_k: 0, transformers
    draws from the 50 likeliest tokens."""
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def refuse_no_number(ids_BS: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
    """A logits processor of transformers that changes nothing.

    Raises:
        UserError: NaN or infinity among the logits, of which the likeliest token would be some token.
    """
    if bool(torch.isnan(logits_BV).any() | torch.isposinf(logits_BV).any()):
        raise UserError("the checkpoint gives NaN or infinity for the next token: use another checkpoint")
    return logits_BV


def generate_plainly(model: Any, tokenizer: Any) -> None:
    """Give a model a generation_config of nothing but the tokens at which it stops, and whether it may cache: penalties
    and other defaults of its folder act only where they are asked for, so that temperature 0 is the likeliest token."""
    from transformers import GenerationConfig

    ends, before = end_token_ids(tokenizer), getattr(model, "generation_config", None)
    caches = {"use_cache": False} if getattr(before, "use_cache", None) is False else {}
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=ends[0], **caches
    )


def learned_positions(model: Any) -> int | None:
    """How many positions the model has an embedding for; None where positions are not learned, and none is the last."""
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens]
    return getattr(model.config, "max_position_embeddings", None) if tables else None


def read_prompt(
    tokenizer: Any, prompt: str, rows: int | None = None, chat: bool = False, longest: int | None = None
) -> Any:
    """A prompt's tokens, one row, with their attention mask, by the rule of `moe_llm.data.documents`.

    Args:
        rows: of the model's embedding; None: as many as there are tokens.
        chat: a chat template has rendered it, so that nothing is put before it. longest: tokens; the rest is left
            out.

    Raises:
        UserError: there are none, and so nothing to continue; or one is beyond the model's rows.
    """
    from transformers import BatchEncoding

    ids = prompt_ids(tokenizer, prompt, begin=not chat)[:longest]
    if not ids:
        raise UserError(f"the prompt {prompt!r} has no tokens: give a text to continue")
    if rows is not None:
        check_rows(ids, tokenizer, rows, f"the prompt {prompt!r}")
    ids_BS = torch.tensor([ids])
    return BatchEncoding({"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)})


def as_prompt(tokenizer: Any, prompt: str, rows: int, chat: bool, name: str) -> Any:
    """`read_prompt` of a text or, with `chat`, of a user's turn in the tokenizer's chat template.

    Args:
        name: of the model, for errors.

    Raises:
        UserError: chat, and there is no template, or it refuses the turn.
    """
    if not chat:
        return read_prompt(tokenizer, prompt, rows)
    if own_template(tokenizer) is None:
        raise UserError(
            f"--chat: the tokenizer of {name} has no chat template: save one beside it, or leave out --chat"
        )
    text = render_prompt(tokenizer, [{"role": "user", "content": prompt}], "--prompt")
    return read_prompt(tokenizer, text, rows, chat=True)


def said(tokenizer: Any, ids_T: torch.Tensor, behind: int) -> str:
    """The text of tokens behind the first `behind`, as what these add to the text before: many tokenizers drop the space
    that a text of its own begins with."""
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (ids_T[:behind], ids_T))
    return whole[len(before) :]

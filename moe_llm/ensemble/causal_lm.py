"""Any causal LM that transformers knows, from a directory, and how it is sampled from."""

from pathlib import Path
from typing import Any

import torch

from moe_llm.checkpoint.architectures import OWN
from moe_llm.checkpoint.safetensors_io import read_json
from moe_llm.data.tokenizer import end_token_ids
from moe_llm.errors import UserError


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
    from safetensors import SafetensorError
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from transformers.utils import logging

    logging.disable_progress_bar()
    unset_hf_deepspeed_config()  # under ZeRO-3 transformers would cut the model up among the ranks
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of what is missing, of which a sentence is told below
    try:
        model, info = _class_of(checkpoint, called).from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
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
    return model.eval()


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
    from moe_llm.checkpoint.remote_code.modeling_moe_llm import MoELLMForCausalLM

    return MoELLMForCausalLM


def sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """generate()'s options for a temperature, 0 meaning the likeliest token, and top-p. Without top_k: 0, transformers
    draws from the 50 likeliest tokens."""
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def plain_generation(tokenizer: Any) -> Any:
    """A generation_config of nothing but the tokens at which the model stops: penalties and other defaults of its folder
    act only where they are asked for, so that temperature 0 is the likeliest token."""
    from transformers import GenerationConfig

    ends = end_token_ids(tokenizer)
    return GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=ends[0])


def learned_positions(model: Any) -> int | None:
    """How many positions the model has an embedding for; None where positions are not learned, and none is the last."""
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens]
    return getattr(model.config, "max_position_embeddings", None) if tables else None


def read_prompt(tokenizer: Any, prompt: str, **options: Any) -> Any:
    """A prompt's tokens, one row, by the rule of documents in training: it begins with the start of text, once, where the
    tokenizer has one, whatever `add_bos_token` says. It does not end with the end of text, since it is to be continued.

    Raises:
        UserError: there are none, and so nothing to continue.
    """
    inputs = tokenizer(prompt, return_tensors="pt", **options)
    ids_BS = inputs["input_ids"]
    length, bos = ids_BS.shape[1], tokenizer.bos_token_id
    told_not_to = getattr(tokenizer, "init_kwargs", {}).get("add_bos_token") is False
    if told_not_to and bos is not None and bos not in ids_BS[0, :2].tolist() and length:
        inputs["input_ids"] = ids_BS = torch.cat([torch.tensor([[bos]]), ids_BS], 1)
        if "attention_mask" in inputs:
            inputs["attention_mask"] = torch.ones_like(ids_BS)
        length += 1
    first = int(length > 1 and bos is not None and ids_BS[0, :2].tolist() == [bos, bos])
    ended = length > first and int(ids_BS[0, -1]) == tokenizer.eos_token_id != bos
    ended = ended and not prompt.endswith(tokenizer.eos_token)
    for name in ("input_ids", "attention_mask"):
        if name in inputs:
            inputs[name] = inputs[name][:, first : length - ended]
    if not inputs["input_ids"].shape[1]:
        raise UserError(f"the prompt {prompt!r} has no tokens: give a text to continue")
    return inputs

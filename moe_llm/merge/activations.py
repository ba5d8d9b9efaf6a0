"""What the layers of a mixture get as inputs on a text: the model is built and run, the only such place in merging."""

from collections.abc import Iterator

import torch

from moe_llm.config.data import SourceConfig
from moe_llm.data.sources import list_files, read_documents
from moe_llm.errors import UserError
from moe_llm.merge.models import Model
from moe_llm.merge.vocabulary import load_tokenizer

_LENGTH = 512  # tokens at a time


def check_text(files: list[str], models: list[Model]) -> None:
    """Refuse text that is not there, and models that would read it differently, before any work.

    Raises:
        UserError: missing files, or two tokenizers.
    """
    list_files(_source(files), "align_text")
    first = load_tokenizer(models[0].directory).get_vocab()
    for other in models[1:]:
        if load_tokenizer(other.directory).get_vocab() != first:
            raise UserError(
                f"{models[0].reference} and {other.reference} have different tokenizers, and align_experts: "
                "activations compares them token by token: set align_experts: weights"
            )


@torch.no_grad()
def layer_inputs(model: Model, files: list[str], tokens: int) -> dict[int, torch.Tensor]:
    """Inputs of the router and experts of each layer that has them, (T, D) in fp32, for the first `tokens` tokens of the files."""
    from moe_llm.checkpoint.pretrained import MoEForCausalLM

    network = MoEForCausalLM.from_pretrained(model.directory, "fp32")
    collected: dict[int, list[torch.Tensor]] = {layer: [] for layer in network.config.moe_layers}
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0].flatten(0, 1)))
        for layer, into in zip(network.model.moe_layers, collected.values(), strict=True)
    ]
    for ids in _blocks(model, files, tokens):
        network(torch.tensor([ids]), return_logits=False)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(parts) for layer, parts in collected.items()}


def _blocks(model: Model, files: list[str], tokens: int) -> Iterator[list[int]]:
    tokenizer, left = load_tokenizer(model.directory), tokens
    for text in read_documents(_source(files), "align_text"):
        # a document is not encoded far beyond what is used of it
        ids = tokenizer(text[: 32 * left], add_special_tokens=False)["input_ids"][:left]
        for start in range(0, len(ids), _LENGTH):
            yield ids[start : start + _LENGTH]
        left -= len(ids)
        if left <= 0:
            return


def _source(files: list[str]) -> SourceConfig:
    return SourceConfig(type="files", path=files)

"""Teachers of any architecture say of packed blocks what they say of each document alone."""

import pytest
import torch
from support.training import rows
from torch import nn

from moe_llm.data.packing import IGNORED, Batch
from moe_llm.distill.teachers import Ensemble, ForeignTeacher, documents
from moe_llm.errors import UserError

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}


def architectures():
    import transformers as t

    return {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig(**SIZES), True),
        "window": (t.MistralForCausalLM, t.MistralConfig(**SIZES, sliding_window=3), True),
        "learned positions": (
            t.GPT2LMHeadModel,
            t.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2),
            True,
        ),
        "scaled logits": (
            t.CohereForCausalLM,
            t.CohereConfig(
                **{k: v for k, v in SIZES.items() if k != "head_dim"},
                logit_scale=0.5,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
            False,
        ),
        "capped logits": (t.Gemma2ForCausalLM, t.Gemma2Config(**SIZES, final_logit_softcapping=2.0), False),
        "state space": (
            t.MambaForCausalLM,
            t.MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2),
            True,
        ),
    }


def build(name: str) -> tuple[nn.Module, bool]:
    kind, config, chunked = architectures()[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():  # so that what is seen shows
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model, chunked


def packed(isolated: bool = True) -> Batch:
    """Three blocks of 12: documents of 5, 4 and 2 with a place of padding; of 1 and 11; and whole blocks else."""
    batch = rows(0, 0, 3)
    lengths = [[5, 4, 2], [1, 11], [12]]
    ids, mask, labels = torch.full((3, 12), -1), torch.zeros(3, 12, dtype=torch.bool), batch.labels_BS.clone()
    for row, found in enumerate(lengths):
        for document, end in enumerate(torch.tensor(found).cumsum(0).tolist()):
            ids[row, end - found[document] : end] = document
            labels[row, end - 1] = IGNORED
        mask[row, : sum(found)] = True
    labels[~mask] = IGNORED
    labels[2, :6] = IGNORED  # of a prompt
    positions = torch.arange(12).expand(3, 12)
    return Batch(batch.input_ids_BS, labels, positions, ids if isolated else None, mask)


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize(
    "name", ["llama", "window", "learned positions", "scaled logits", "capped logits", "state space"]
)
def test_a_document_is_read_as_if_it_stood_alone(name, isolated):
    model, chunked = build(name)
    batch, teacher = packed(isolated), ForeignTeacher(model, "teacher")
    assert teacher.width == 61
    hidden = teacher.hidden(batch)
    assert hidden.shape == (batch.num_targets, 16 if chunked else 61)
    expected = []
    with torch.no_grad():
        for document in documents(batch):
            logits = model(batch.input_ids_BS[document][None]).logits[0]
            expected.append(logits[batch.labels_BS[document] != IGNORED])
    assert torch.allclose(teacher.logits(hidden), torch.cat(expected), atol=1e-5)
    assert len(documents(batch)) == (6 if isolated else 3)


def test_a_model_that_looks_ahead_is_refused():
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    model = BertLMHeadModel(
        BertConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.5,
        )
    ).eval()
    with pytest.raises(UserError, match=r"teachers\.3\.path is a model that looks ahead"):
        ForeignTeacher(model, "distill.teachers.3")


class Fixed:
    """A teacher of given logits, in a wider vocabulary."""

    def __init__(self, logits):
        self._logits, self.width = logits, logits.shape[1]

    def hidden(self, batch):
        return self._logits

    def logits(self, hidden):
        return hidden


def test_an_ensemble_is_the_mean_of_probabilities_and_then_has_a_temperature():
    torch.manual_seed(0)
    one, two = torch.randn(4, 12), torch.randn(4, 10)
    ensemble = Ensemble([Fixed(one), Fixed(two)], [3.0, 1.0], 9, 2.0)
    found = ensemble.log_p(ensemble.hidden(None), 1, 3, torch.device("cpu"))
    mean = 0.75 * one[1:3, :9].softmax(-1) + 0.25 * two[1:3, :9].softmax(-1)
    expected = mean.sqrt() / mean.sqrt().sum(-1, keepdim=True)
    assert torch.allclose(found.exp(), expected, atol=1e-6)

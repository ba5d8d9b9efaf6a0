"""The ensemble inside transformers' generate(): greedy, sampling, beams, streaming.

generate() runs the main model; the processor runs the others and replaces the main model's scores by the ensemble's.

    ensemble = Ensemble(load_recipe("ensemble.yaml"))
    inputs = ensemble.main.tokenizer(texts, return_tensors="pt", padding=True)
    generate(ensemble, inputs, num_beams=4, max_new_tokens=40)

Shapes: R rows (prompts times beams), T tokens, V vocabulary of the main model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from moe_llm.ensemble.context import Contextual
from moe_llm.ensemble.ensemble import Ensemble
from moe_llm.ensemble.kv_cache import CachedMember
from moe_llm.ensemble.rules import LinearMixture
from moe_llm.ensemble.scores import last_rows, score_rows


class EnsembleLogitsProcessor(LogitsProcessor):
    """Scores of the main model to log-probabilities of the ensemble; for one call of generate().

    generate() applies it after the processors of its own options and before temperature, top-k and top-p. What those
    before it forbid (-inf) stays forbidden; a penalty that they put on a token counts as the main model's opinion.

    A row for which nobody else is asked keeps its scores as they came.

    rows, asked: next tokens so far, and for how many of them the others were asked. disagreement: nats, summed over
    them, of members that are mixed (`LinearMixture.disagreement`).

    Args:
        attention_mask: of the prompts, (prompts, tokens); None: no padding.
        use_cache: False computes the other members anew at each step.
    """

    def __init__(self, ensemble: Ensemble, attention_mask: Tensor | None = None, use_cache: bool = True):
        self.ensemble, self.rule = ensemble, ensemble.rule
        self.rows = self.asked = 0
        self.disagreement = 0.0
        self._followers = {
            u: CachedMember(ensemble.models[u], ensemble.translators[u], attention_mask, use_cache)
            for u in self.rule.needed
        }
        self._prompt_mask_BP = attention_mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        main_RV = scores.float().log_softmax(-1)
        if isinstance(self.rule, Contextual):
            return self._by_context(self.rule, input_ids, scores, main_RV)
        asked_R = self.rule.asks(main_RV)
        self.rows += len(scores)
        self.asked += int(asked_R.sum())
        if not asked_R.any():
            return scores
        # all are started before the first is waited for: on several devices they run side by side
        logits = {u: follower.next_logits(input_ids) for u, follower in self._followers.items()}
        found: list[Any] = [main_RV, *[None] * (len(self.ensemble.models) - 1)]
        for u, logits_RW in logits.items():
            found[u] = self.ensemble.over_main(u, logits_RW, main_RV)
        combined_RV = self.rule(found)
        if isinstance(self.rule, LinearMixture):
            self.disagreement += float(self.rule.disagreement(found, combined_RV).sum())
        combined_RV = combined_RV.masked_fill(scores == -torch.inf, -torch.inf)
        return torch.where(asked_R[:, None], combined_RV, scores.float())

    def _by_context(self, rule: Contextual, input_ids: Tensor, scores: Tensor, main_RV: Tensor) -> Tensor:
        """The features are of all tokens so far: every model reads them anew at each step."""
        mask_RT = torch.ones_like(input_ids, dtype=torch.bool)
        if self._prompt_mask_BP is not None:
            prompts_RP = self._prompt_mask_BP.bool().to(mask_RT.device)
            prompts_RP = prompts_RP.repeat_interleave(len(input_ids) // len(prompts_RP), 0)
            mask_RT[:, : prompts_RP.shape[1]] = prompts_RP
        scored = score_rows(self.ensemble, last_rows(input_ids, mask_RT))
        found = [main_RV, *scored.log_probs[1:]]
        assert scored.context_NF is not None, "weights by context have features"
        combined_RV = rule(found, scored.context_NF)
        self.rows += len(scores)
        self.asked += len(scores)
        self.disagreement += float(rule.disagreement(found, combined_RV, scored.context_NF).sum())
        return combined_RV.masked_fill(scores == -torch.inf, -torch.inf)


def generate(ensemble: Ensemble, inputs: Mapping[str, Tensor], use_cache: bool = True, **options: Any) -> Any:
    """What the main model's generate() gives under the ensemble.

    Args:
        inputs: input_ids and attention_mask, as the main model's tokenizer gives them; padding on the left.
        use_cache: of all members.
        options: generate()'s own, a logits_processor among them, which comes after the ensemble.
    """
    processor = EnsembleLogitsProcessor(ensemble, inputs.get("attention_mask"), use_cache)
    processors = LogitsProcessorList([processor, *options.pop("logits_processor", [])])
    device = ensemble.main.device
    tensors = {name: tensor.to(device) for name, tensor in inputs.items()}
    use_cache = use_cache and ensemble.main.caches
    return ensemble.main.model.generate(**tensors, use_cache=use_cache, logits_processor=processors, **options)

"""What transformers' model also says of a step: what each loss adds to the gradients; and the loss of held-out text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_llm.doctor.oracle.router_losses import Seen
from moe_llm.doctor.oracle.transformer import Reference

if TYPE_CHECKING:
    from moe_llm.data.packing import Batch


class FullReference(Reference):
    """A `Reference` that also takes gradients apart and evaluates."""

    def shares(
        self, weights: Mapping[str, np.ndarray], rounds: Sequence["Batch"]
    ) -> dict[tuple[int, str], dict[str, np.ndarray]]:
        """What each loss of each round adds to the gradients of a step, by the round's number and the loss's name, of the
        losses that have a coefficient."""
        self.begun = False
        self._load(weights)
        titles = ["language-model loss", "balance loss", "z-loss", *(loss.name for loss in self.own)]
        parameters = {n: s.tensor for n, s in self.stored.items() if isinstance(s.tensor, torch.nn.Parameter)}
        found = {}
        for number, parts in enumerate(self._rounds(rounds, Seen())):
            for title, part, coefficient in zip(titles, parts, self._coefficients().tolist()):
                if coefficient:
                    slopes = torch.autograd.grad(
                        coefficient * part, list(parameters.values()), retain_graph=True, allow_unused=True
                    )
                    found[number, title] = {
                        name: self.stored[name].as_ours(torch.zeros_like(p) if slope is None else slope).numpy().copy()
                        for (name, p), slope in zip(parameters.items(), slopes)
                    }
        return found

    @torch.no_grad()
    def held_out(self, weights: Mapping[str, np.ndarray], batches: Iterable["Batch"]) -> float:
        """Cross-entropy of these rows, over all of their targets. Routers' buffers are those behind the last step."""
        self._load(weights)
        loss_sum, targets = 0.0, 0
        for batch in batches:
            loss_sum += float(self._forward(batch)[0])
            targets += int((batch.labels_BS != -100).sum())
        return loss_sum / targets

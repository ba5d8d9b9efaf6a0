"""Switch Transformers' router (Fedus et al. 2021, section 2): one expert a token."""

from torch import Tensor

from moe_llm.config.routers import SwitchSettings
from moe_llm.model.moe.router import TokenChoiceRouter


class SwitchRouter(TokenChoiceRouter):
    """The likeliest expert, weighted by its probability (equation 2), which is what the router learns by.

    The router computes in fp32 whatever the model's dtype (selective precision, section 2.4); `router_jitter_noise` is
    the paper's input jitter.
    """

    Settings = SwitchSettings

    def weights(self, value_TR: Tensor, shared_TR: Tensor) -> Tensor:
        return value_TR

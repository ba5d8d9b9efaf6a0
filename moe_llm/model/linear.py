"""A linear map whose products are those of `moe_llm.ops.products`."""

from torch import Tensor, nn

from moe_llm.ops.products import linear


class Linear(nn.Linear):
    """x W^T, without bias; as torch's in all else."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

"""A linear map whose products are those of `moe_llm.ops.products`."""

from torch import Tensor, nn

from moe_llm.ops.products import linear


class Linear(nn.Linear):
    """x W^T, plus a bias where one is asked for; as torch's in all else."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias

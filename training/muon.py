"""Muon: momentum with orthogonalised matrices, for the hidden layers of the transformers.

After Jordan et al., "Muon: an optimizer for hidden layers" (2024), with a step that grows with the
matrix as in Liu et al., "Muon is scalable for LLM training" (2025). torch's own Muon iterates in
bfloat16, which takes seconds a step on a CPU without bfloat16 products.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
STEP = 0.5  # 0.2 would match the length of AdamW's steps; networks this small allow longer ones


class Muon(torch.optim.Optimizer):
    """An optimiser for matrices; AdamW trains vectors, tables and the outermost layers."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["average"] = torch.zeros_like(weight)
                average = state["average"]
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(average, group["momentum"]))
                scale = STEP * max(weight.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with singular values near one and the same singular vectors (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x

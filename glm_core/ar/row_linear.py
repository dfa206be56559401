"""Linear layers for inputs of mostly one row, as in the AR model; what a CPU is fast in."""

from functools import cache

import torch
from torch import Tensor, nn


class RowLinear(nn.Linear):
    """`nn.Linear` that multiplies a single bf16 row by torch's vector kernel if that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        if not (x.dtype == torch.bfloat16 and x.numel() == self.in_features and _is_faster(x)):
            return super().forward(x)
        row = x.flatten()
        if self.bias is None:
            out = torch.mv(self.weight, row)
        else:
            out = torch.addmv(self.bias, self.weight, row)
        return out.view(*x.shape[:-1], -1)


class RowOperations:
    """Layers for a network that reads one id per step."""

    Linear = RowLinear
    Embedding = nn.Embedding
    RMSNorm = nn.RMSNorm


def _is_faster(x: Tensor) -> bool:
    """Whether torch's vector kernel is faster for one row than its matrix kernel.

    On CPUs with AMX it reads the weight at memory speed. The matrix kernel is 20 % slower, and at
    some widths takes twice the time. On CPUs with AVX-512 or AVX2 the vector kernel is slower.
    """
    return x.device.type == "cpu" and cpu_has("amx_bf16")


def cpu_is_fast_in_bf16(few_rows: bool) -> bool:
    """Whether a network computes faster in bf16 than in float32 on this CPU.

    With few rows a CPU mostly reads weights, and bf16 is half the bytes. With many it is fast only
    if it has instructions that multiply matrices in bf16; others convert every number.
    """
    return few_rows or cpu_has("amx_bf16", "avx512_bf16")


@cache
def cpu_has(*names: str) -> bool:
    """Whether the CPU has any of these instruction sets.

    Args:
        names: as in `torch.cpu.get_capabilities`. Older versions of torch lack that function, and
            the answer is False.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in names)

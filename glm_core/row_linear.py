"""Linear layers that are mostly given one row, as the AR model's are."""

from functools import cache

import torch
from torch import Tensor, nn


class RowLinear(nn.Linear):
    """`nn.Linear`, by the kernel for vectors where a lone row in bf16 is multiplied faster so."""

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
    """Layers to build a network from that reads one id a step."""

    Linear = RowLinear
    Embedding = nn.Embedding
    RMSNorm = nn.RMSNorm


def _is_faster(x: Tensor) -> bool:
    return x.device.type == "cpu" and _cpu_has_avx512()


@cache
def _cpu_has_avx512() -> bool:
    """There torch's kernel for vectors reads the weight at the pace of memory. On CPUs with AMX
    the one for matrices stays 20 % below that for one row, at some widths by half; with AVX-512
    alone both are as fast, and with AVX2 the one for matrices is faster."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"

"""Linear layers that are mostly given one row, as the AR model's are."""

from functools import cache

import torch
from torch import Tensor, nn


class RowLinear(nn.Linear):
    """`nn.Linear`, by the kernel for vectors where that multiplies a lone row in bf16 faster."""

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
    """On CPUs with AMX torch's kernel for vectors reads the weight at the pace of memory, and the
    one for matrices is 20 % slower for one row, at some widths twice as slow. On others, with
    AVX-512 as with AVX2, the one for vectors is the slower."""
    return x.device.type == "cpu" and cpu_has("amx_bf16")


@cache
def cpu_has(*names: str) -> bool:
    """Whether the CPU has any of these instruction sets.

    Args:
        names: as `torch.cpu.get_capabilities` calls them; older torch lacks that function, and
            then the answer is no.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in names)

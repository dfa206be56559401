"""A linear layer with a packed matrix as its weight, which replaces a plain layer.

The weight has one of two layouts. Its shape says which, as a shape survives every move and copy:

    [bytes]       as stored; dequantised on every pass, best for thousands of rows
    [1, bytes]    as the kernel of a device reads it, best for few rows
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import kernel_for
from .packing import Packing, dequantise, packing, quantise


class PackedLinear(nn.Module):
    """`nn.Linear` with a packed weight.

    Args:
        form: the matrix's shape and format.
        bias: whether the layer has a bias, which is loaded with the weight.
        few_rows: whether most passes have few rows, for which kernels are made.
    """

    def __init__(self, form: Packing, bias: bool, few_rows: bool) -> None:
        super().__init__()
        self.form = form
        self.few_rows = few_rows
        self.out_features, self.in_features = form.rows, form.columns
        self.kernel_device: torch.device | None = None  # the weight has the layout of its kernel
        packed = torch.empty(form.nbytes, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        empty = torch.empty(form.rows, device="meta")
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.multiply(x, self.weight, bias)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] times a weight of this layer in either layout, plus bias, in x's dtype.

        Kernels take x in bf16. That rounding is an eighth of the weights' rounding to int8.
        """
        if weight.ndim == 1:
            return F.linear(x, dequantise(weight, self.form, x.dtype), bias)
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        out = kernel_for(self.form, x.device).product(self.form, rows, weight[0])
        out = out.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return out if bias is None else out + bias

    def lay_out(self, device: torch.device) -> None:
        """Bring the weight into the layout of a device's kernel, once. It stays where it is."""
        if self.few_rows and self.weight.ndim == 1 and kernel_for(self.form, device):
            self.kernel_device = device
            self.weight = nn.Parameter(self._laid_out(self.weight), requires_grad=False)

    def _laid_out(self, stored: Tensor) -> Tensor:
        if self.kernel_device is None:
            return stored
        kernel = kernel_for(self.form, self.kernel_device)
        laid_out = kernel.lay_out(self.form, stored.to(self.kernel_device))
        return laid_out[None].to(stored.device)

    def dequantised(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] of a weight of this layer in either layout."""
        if weight.ndim == 2:
            kernel = kernel_for(self.form, self.kernel_device)
            stored = kernel.restore(self.form, weight[0].to(self.kernel_device))
            weight = stored.to(weight.device)
        return dequantise(weight, self.form, dtype)

    def requantised(self, weight: Tensor) -> Tensor:
        """A matrix [N, K] in this layer's format and layout."""
        return self._laid_out(quantise(weight, self.form.name))


def pack_layers(
    network: nn.Module,
    layers: Mapping[str, bool],
    name: str,
    few_rows: bool,
    kind: type[PackedLinear] = PackedLinear,
) -> None:
    """Replace linear layers with packed ones, before weights are loaded.

    Args:
        layers: the modules' names, and whether each has a bias. The modules do not show it: layers
            of some hosts get their bias only on loading.
        name: one of `packing.FORMATS`.
        few_rows: see `PackedLinear`.

    Raises:
        GLMImageError: a layer has a width that the format does not take.
    """
    for layer, bias in layers.items():
        plain = network.get_submodule(layer)
        form = packing((plain.out_features, plain.in_features), name)
        parent, _, child = layer.rpartition(".")
        setattr(network.get_submodule(parent), child, kind(form, bias, few_rows))


def lay_out(network: nn.Module, device: torch.device) -> None:
    """Bring the weights of all packed few-row layers into the layouts of a device's kernels."""
    for module in network.modules():
        if isinstance(module, PackedLinear):
            module.lay_out(device)

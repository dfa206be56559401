"""What products in fp8 would cost: how large the inputs of layers are, and what rounding them does.

python -m scripts.measure_ranges tiny "a red circle" --width 512 --height 512

Hosts that multiply in fp8 without a scale for the inputs round them to float8_e4m3fn as they are:
above 448 they are cut off, below 2^-9 they become zero. Weights are kept as they are here, so that
the error is that of the inputs alone.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm_core.ar.model import Block as ARBlock
from glm_core.decoder.model import Block as DecoderBlock
from glm_core.files.quantisation import FP8
from glm_core.files.weight_dtypes import is_layer_matrix

from .without_comfyui import TextToImage

LARGEST = torch.finfo(FP8).max
STEPS = 4


class Ranges:
    """Of the inputs of a network's layers: the largest, the share cut off, products' errors."""

    def __init__(self) -> None:
        self.layers: dict[str, list[tuple[float, float, float]]] = {}

    def note(self, name: str, layer: nn.Linear, x: Tensor) -> None:
        exact = F.linear(x, layer.weight)
        rounded = F.linear(x.clamp(-LARGEST, LARGEST).to(FP8).to(x.dtype), layer.weight)
        error = ((rounded - exact).norm() / exact.norm()).item()
        cut = (x.abs() > LARGEST).float().mean().item()
        self.layers.setdefault(name, []).append((x.abs().max().item(), cut, error))

    def line(self, network: str) -> str:
        largest, cut, error = (
            {name: max(found[i] for found in noted) for name, noted in self.layers.items()}
            for i in range(3)
        )
        at, worst = (max(values, key=values.get) for values in (largest, error))
        return (
            f"{network}: largest input {largest[at]:.4g} ({at}); at most {max(cut.values()):.2%} "
            f"of an input above {LARGEST:.0f}; a product moves by {min(error.values()):.2%} to "
            f"{error[worst]:.2%} ({worst})"
        )


@contextmanager
def watching(block: type[nn.Module], ranges: Ranges) -> Iterator[None]:
    """Note the inputs of every layer that conversion puts into fp8, in blocks of a class."""

    def begin(module: nn.Module, args: tuple) -> None:
        if isinstance(module, block):
            for name, layer in module.named_modules():
                if isinstance(layer, nn.Linear) and is_layer_matrix(f"blocks.0.{name}.weight", 2):
                    layers[layer] = name
        elif module in layers:
            ranges.note(layers[module], module, args[0])

    layers: dict[nn.Module, str] = {}
    hook = nn.modules.module.register_module_forward_pre_hook(begin)
    try:
        yield
    finally:
        hook.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("snapshot")
    parser.add_argument("prompt")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    size = (args.height, args.width)
    picture = TextToImage(
        args.snapshot, args.prompt, size, STEPS, 1.5, 0, args.device, torch.float32
    )
    ar, decoder = Ranges(), Ranges()
    with torch.inference_mode():
        with watching(ARBlock, ar):
            tokens = picture.write_tokens()
        with watching(DecoderBlock, decoder):
            picture.denoise(tokens, *picture.encode_glyphs())
    print(ar.line("AR model"))
    print(decoder.line("decoder"))


if __name__ == "__main__":
    main()

"""`python -m scripts.measure_references`: what the reference cache saves at every step.

A decoder of 8 blocks with 8 heads of 64, random weights, float32, on one thread of this machine, a
512 x 512 picture and references of that size. One conditional step is timed with the references'
keys and values cached, and with the references run again inside the step, as full attention across
image and references has to.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch

from glm_core.decoder import Decoder, DecoderConfig, KeysValues

CONFIG = DecoderConfig(
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=8,
    attention_head_dim=64,
    num_attention_heads=8,
    text_embed_dim=128,
    time_embed_dim=128,
    condition_dim=64,
    prior_vq_quantizer_codebook_size=1024,
)
SIZE = (512, 512)
COUNTS = (1, 2, 4)
ROUNDS = 5


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # steady figures on a machine that does other things too
    decoder = Decoder(CONFIG)
    latent = torch.randn(1, CONFIG.in_channels, SIZE[0] // 8, SIZE[1] // 8)
    tokens = torch.randint(1024, (1, SIZE[0] // 16, SIZE[1] // 16))
    glyphs = torch.randn(1, 16, CONFIG.text_embed_dim)
    invariants = decoder.prepare(glyphs, tokens, torch.float32)

    def keys_values(count: int) -> list[list[KeysValues]]:
        runs = [list(decoder.reference_keys_values(latent, tokens, SIZE)) for _ in range(count)]
        return [
            [tuple(torch.cat(parts, dim=2) for parts in zip(*blocks, strict=True))]
            for blocks in zip(*runs, strict=True)
        ]

    def step(references: list | None) -> None:
        decoder.predict(latent, torch.tensor([500.0]), SIZE, invariants, references=references)

    with torch.inference_mode():
        sys.stdout.write("references | cached s/step | recomputed s/step | ratio\n")
        for count in COUNTS:
            kept = keys_values(count)
            cached, again = alternate(
                lambda kept=kept: step(kept), lambda count=count: step(keys_values(count))
            )
            sys.stdout.write(f"{count} | {cached:.2f} | {again:.2f} | {again / cached:.1f}\n")


def alternate(*runs: Callable[[], None]) -> Iterator[float]:
    """Median seconds of each run, taken in turn after one warm-up."""
    seconds: list[list[float]] = [[] for _ in runs]
    for round_ in range(ROUNDS + 1):
        for run, times in zip(runs, seconds, strict=True):
            since = time.perf_counter()
            run()
            if round_:
                times.append(time.perf_counter() - since)
    return map(statistics.median, seconds)


if __name__ == "__main__":
    main()

"""`python -m scripts.measure_layouts`: eight layouts in one batch, and one after the other.

An AR model of 6 layers of width 2048 with random weights in bf16, about 600 MB of them: too many
for a processor's cache, so that reading them is most of a step, as it is at full size. The image is
1024 x 1024, its preview 256 cells. One thread: two wait for each other on a machine that is busy.
"""

import sys
import time

import torch

from glm_core.ar_model import ARConfig, ARModel
from glm_core.grids import text_positions, token_grid
from glm_core.logits import SamplingOptions, sample_layout
from glm_core.prompt import Prompt

CONFIG = ARConfig(
    vocab_size=2304,
    visual_size=2176,
    codebook=2048,
    hidden_size=2048,
    intermediate_size=6144,
    layers=6,
    heads=16,
    kv_heads=2,
    head_dim=128,
    rms_eps=1e-5,
    attention_bias=True,
    rope_theta=10000.0,
    rotary_dim=64,
    mrope_section=(8, 12, 12),
    image_start=2048,
    image_end=2049,
    image_token=2050,
)
PROMPT_LENGTH = 40
LAYOUTS = 8


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ARModel(CONFIG, dtype=torch.bfloat16)
    ids = torch.randint(CONFIG.visual_size, CONFIG.vocab_size, (PROMPT_LENGTH,))
    prompt = Prompt(ids, text_positions(PROMPT_LENGTH))

    def seconds(seed: int, batch: int) -> float:
        start = time.perf_counter()
        place = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
        grid = token_grid(1024, 1024)
        sample_layout(model, prompt, grid, seed, batch, SamplingOptions(), **place)
        return time.perf_counter() - start

    with torch.inference_mode():
        alone = [seconds(seed, 1) for seed in range(LAYOUTS)]
        together = seconds(0, LAYOUTS)
    one = sum(alone) / LAYOUTS
    sys.stdout.write(
        f"one layout {one:.1f} s, {LAYOUTS} one after the other {sum(alone):.1f} s, {LAYOUTS} in "
        f"one batch {together:.1f} s: {together / one:.2f} times one, "
        f"{sum(alone) / together:.1f} times faster\n"
    )


if __name__ == "__main__":
    main()

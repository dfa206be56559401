"""`python -m scripts.measure_quantised`: the size, speed and agreement of int8 and int4 weights.

The AR model has 24 layers of width 2048 and random bf16 weights (Gaussian, 1 / sqrt(fan-in)). Its
logits over a random sequence, given the same history, are compared with those of the same weights
computed in float32. It runs on one thread, because two would wait for each other on a busy machine.
"""

import copy
import statistics
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor

from glm_core.ar.cache import BlockPass
from glm_core.ar.model import ARConfig, ARModel, rope_table
from glm_core.ar.philox import gumbel, sample_keys
from glm_core.ar.step import SamplingOptions, gumbel_max
from glm_core.data.grids import text_positions
from glm_core.files.quantisation import layer_of
from glm_core.files.weight_dtypes import is_layer_matrix
from glm_core.quant.linear import lay_out, pack_layers
from glm_core.quant.packing import FORMATS, quantise

MEDIUM = ARConfig(
    vocab_size=2304,
    visual_size=2176,
    codebook=2048,
    hidden_size=2048,
    intermediate_size=6848,
    layers=24,
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
LENGTH = 128
STEPS = 15


class Agreement(NamedTuple):
    """How close a model's logits are to the reference's.

    Args:
        kl: mean Kullback-Leibler divergence from the reference, in nats.
        greedy: share of positions where both have the same likeliest token.
        drawn: share of positions where both draw the same token with the same noise, at the
            checkpoint's temperature and top_p.
    """

    kl: float
    greedy: float
    drawn: float


def random_model(config: ARConfig, seed: int = 0) -> ARModel:
    """A bf16 model with Gaussian weights that keep activations near unit size."""
    generator = torch.Generator().manual_seed(seed)
    model = ARModel(config, dtype=torch.bfloat16).requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            scale = 1.0 if "embed" in name else weight.shape[1] ** -0.5
            weight.normal_(0, scale, generator=generator)
    return model


def quantised(model: ARModel, name: str, device: torch.device) -> ARModel:
    """A copy with the layers' matrices in a format of FORMATS, laid out for a device."""
    state = model.state_dict()
    layers = [layer_of(key) for key, value in state.items() if is_layer_matrix(key, value.ndim)]
    state |= {f"{layer}.weight": quantise(state[f"{layer}.weight"], name) for layer in layers}
    with torch.device("meta"):
        packed = ARModel(model.config, dtype=torch.bfloat16)
    pack_layers(packed, {layer: f"{layer}.bias" in state for layer in layers}, name, few_rows=True)
    packed.load_state_dict(state, assign=True)
    lay_out(packed, device)
    return packed.requires_grad_(False).to(device)


def teacher_forced(model: ARModel, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits float32 [L, codebook] after each id of a sequence [L], on the ids' device."""
    length, device = len(ids), ids.device
    rope = rope_table(model.config, text_positions(length).to(device), dtype)
    cache = model.new_cache(1, length, device, dtype)
    return model(ids[None], rope, BlockPass(cache, 0), dtype, tail=length)[0].float()


def agreement(reference: Tensor, other: Tensor) -> Agreement:
    """Compares logits float32 [L, codebook] with a reference's."""
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    length, codebook = reference.shape
    columns = torch.arange(length, device=reference.device)
    noise = gumbel(sample_keys((0,), reference.device), 0, 0, columns, codebook)[0]

    def share_alike(options: SamplingOptions, noise: Tensor | None) -> float:
        drawn = (gumbel_max(logits, noise, options) for logits in (reference, other))
        return torch.eq(*drawn).float().mean().item()

    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    greedy = share_alike(SamplingOptions(temperature=0), None)
    return Agreement(kl, greedy, share_alike(SamplingOptions(), noise))


def step_seconds(models: dict[str, ARModel], dtype: torch.dtype) -> dict[str, float]:
    """Median seconds to read one id, by model; the models take turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(STEPS):
        for name, model in models.items():
            start = time.perf_counter()
            teacher_forced(model, torch.zeros(1, dtype=torch.int64), dtype)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    dtype = torch.bfloat16
    model = random_model(MEDIUM)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, MEDIUM.codebook, (LENGTH,), generator=generator)
    exact = teacher_forced(copy.deepcopy(model).float(), ids, torch.float32)
    models = {"bf16": model}
    models |= {name: quantised(model, name, torch.device("cpu")) for name in FORMATS}
    seconds = step_seconds(models, dtype)
    for name, variant in models.items():
        nbytes = sum(weight.nbytes for weight in variant.parameters())
        found = agreement(exact, teacher_forced(variant, ids, dtype))
        sys.stdout.write(
            f"{name}: {nbytes / 2**30:.2f} GiB, {1000 * seconds[name]:.0f} ms a token, KL "
            f"{found.kl:.2g}, likeliest token alike {found.greedy:.1%}, draw {found.drawn:.1%}\n"
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()

"""From logits to a token: the filters, and a Gumbel-max over what they leave."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GLMImageError

MIN_TEMPERATURE = 1e-30  # logits divided by less overflow float32


@dataclass(frozen=True)
class SamplingOptions:
    """The checkpoint's defaults; temperature 0 takes the likeliest token, top_k 0 keeps all."""

    temperature: float = 0.9
    top_p: float = 0.75
    top_k: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or self.temperature >= MIN_TEMPERATURE):
            raise GLMImageError(
                f"temperature is {self.temperature}: use 0 (greedy), or {MIN_TEMPERATURE} or more."
            )
        if not 0 <= self.top_p <= 1:
            raise GLMImageError(f"top_p is {self.top_p}: use a value between 0 and 1.")
        if self.top_k < 0:
            raise GLMImageError(f"top_k is {self.top_k}: use 0 (off) or more.")


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Temperature, then top-k, then top-p, as transformers' logits warpers: float32 [B, n].

    Candidates that drop out become -inf. The temperature must not be 0.
    """
    logits = logits.float() / options.temperature
    if options.top_k:
        kth = logits.topk(min(options.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if options.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - options.top_p
        drop[..., -1] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits


def draw_token(logits: Tensor, noise: Tensor | None, options: SamplingOptions) -> Tensor:
    """Ids int64 [B] from logits and Gumbel noise, both [B, n]; no noise where greedy."""
    if noise is None:
        return logits.argmax(dim=-1)
    return (filter_logits(logits, options) + noise).argmax(dim=-1)

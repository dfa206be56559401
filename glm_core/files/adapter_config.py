"""An adapter's config as PEFT and diffusers save it: alphas and ranks of its modules."""

import math
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ..errors import LoraError

LONGEST_NAME = 300
"""Characters; no module of ours has a longer name, so longer ones have no alpha."""


class AdapterConfigs:
    """The configs in a file's metadata by the model's prefix.

    diffusers' pipelines save `transformer.lora_alpha`, PEFT and single models `lora_alpha`. The
    methods raise a GLMImageError for an entry of another type.
    """

    def __init__(self, adapter_config: Mapping[str, Any]) -> None:
        fields: dict[str, dict[str, Any]] = {}
        for key, value in adapter_config.items():
            prefix, _, field = key.rpartition(".")
            fields.setdefault(prefix, {})[field] = value
        self._configs = {prefix: _Config(values) for prefix, values in fields.items()}

    def alpha(self, module: str, rank: int) -> float | None:
        """What a host has to divide by the rank; None where the config has no alpha.

        PEFT's `use_rslora` scales by alpha / sqrt(rank).
        """
        config, name = self._of(module)
        alpha = config and config.alphas.of(name)
        if config is None or alpha is None:
            return None
        return alpha * math.sqrt(rank) if config.rank_stabilised else alpha

    def scale(self, module: str) -> float:
        """alpha / rank with the config's own rank; 1 where it has not both."""
        config, name = self._of(module)
        rank, alpha = config and config.ranks.of(name), config and config.alphas.of(name)
        return alpha / rank if rank and alpha is not None else 1.0

    def _of(self, module: str) -> "tuple[_Config | None, str]":
        """The module's config, and its name without the prefix."""
        prefix, _, rest = module.partition(".")
        if len(module) > LONGEST_NAME:
            return None, module
        if prefix in self._configs:
            return self._configs[prefix], rest.removeprefix("base_model.model.")
        return self._configs.get(""), module.removeprefix("base_model.model.")


class _Config:
    """One model's. Patterns are read only for a module that needs them: an adapter of another model
    may have patterns that are none of ours."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    @cached_property
    def alphas(self) -> "_Pattern":
        """LoRA's alpha is `lora_alpha`, that of LoHa and LoKr `alpha`."""
        name = "alpha" if self._fields.get("lora_alpha") is None else "lora_alpha"
        return _Pattern(self._fields, "alpha_pattern", name)

    @cached_property
    def ranks(self) -> "_Pattern":
        return _Pattern(self._fields, "rank_pattern", "r")

    @cached_property
    def rank_stabilised(self) -> bool:
        return bool(_typed(self._fields, "use_rslora", bool, "true or false"))


class _Pattern:
    """A number for every module: the first entry of a pattern that names it, else a default.

    A key of a pattern is the end of a module's name, or `^` and the whole name. PEFT takes any
    regular expression; others are refused, as a hostile one could hang.
    """

    def __init__(self, fields: Mapping[str, Any], pattern: str, default: str) -> None:
        entries = _typed(fields, pattern, dict, "an object of numbers") or {}
        value = fields.get(default)
        self._default = None if value is None else _number(default, value)
        self._values = [_number(pattern, value) for value in entries.values()]
        self._whole: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        for position, key in enumerate(entries):
            name = key.replace(r"\.", ".").removesuffix("$")
            end = name.removeprefix("^")
            if not re.fullmatch(r"[\w.]+", end):
                raise LoraError(
                    f"The LoRA's {pattern} holds the regular expression {key[:200]!r}; "
                    "save the LoRA with plain module names there."
                )
            (self._ends if name == end else self._whole).setdefault(end, position)

    def of(self, module: str) -> float | None:
        if not self._values:
            return self._default
        positions = [self._whole[module]] if module in self._whole else []
        end = module
        while end:
            if end in self._ends:
                positions.append(self._ends[end])
            end = end.partition(".")[2]
        return self._values[min(positions)] if positions else self._default


def _typed(fields: Mapping[str, Any], name: str, kind: type, what: str) -> Any:
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        raise LoraError(f"The LoRA's {name} {_cut(value)} is not {what}; save the LoRA again.")
    return value


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise LoraError(f"The LoRA's {name} {_cut(value)} is no number; save the LoRA again.")
    return number


def _cut(value: Any) -> str:
    return repr(value)[:200]

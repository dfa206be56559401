"""Kinds of changes in LoRA files: random tensors of each, and the weight that they make of one."""

import comfy.lora
import comfy.utils
import torch
from torch import Tensor

LAYERS = {
    "decoder": "transformer_blocks.0.attn1.to_q",
    "ar": "model.language_model.layers.0.self_attn.q_proj",
}
RANK, ALPHA = 4, 6.0
SCALE = ALPHA / RANK


def key_of(component: str, layer: str | None = None, target: str = "weight") -> str:
    root = "diffusion_model." if component == "decoder" else ""
    return f"{root}{layer or LAYERS[component]}.{target}"


def plain(models, key: str) -> Tensor:
    patcher = models[0] if key.startswith("diffusion_model.") else models[1].patcher
    return comfy.utils.get_attr(patcher.model, key).detach().clone()


def patched(patcher, models, key: str) -> Tensor:
    """As the host bakes its patches into a weight."""
    return comfy.lora.calculate_weight(patcher.patches[key], plain(models, key), key)


# ---- kinds, as (tensors, the changed weight) ----------------------------------------------------


def lora(w, t):
    tensors = {"lora_A.weight": t(RANK, w.shape[1]), "lora_B.weight": t(w.shape[0], RANK)}
    return tensors, w + SCALE * tensors["lora_B.weight"] @ tensors["lora_A.weight"]


def lora_of_kohya(w, t):
    tensors, expected = lora(w, t)
    return dict(
        zip(("lora_down.weight", "lora_up.weight"), tensors.values(), strict=True)
    ), expected


def dora_of_peft(w, t):
    tensors, changed = lora(w, t)
    magnitude = t(w.shape[0]).abs() + 1
    return (
        tensors | {"lora_magnitude_vector": magnitude},
        magnitude[:, None] * changed / w.norm(dim=1, keepdim=True),
    )


def dora_by_rows(w, t):
    tensors, expected = dora_of_peft(w, t)
    magnitude = tensors.pop("lora_magnitude_vector")
    return tensors | {"dora_scale": magnitude[:, None]}, expected


def dora_by_columns(w, t):
    tensors, changed = lora(w, t)
    magnitude = t(1, w.shape[1]).abs() + 1
    expected = magnitude * changed / changed.norm(dim=0, keepdim=True)
    return tensors | {"dora_scale": magnitude}, expected


def loha(w, t):
    tensors = {}
    for i in "12":
        tensors |= {f"hada_w{i}_a": t(w.shape[0], RANK), f"hada_w{i}_b": t(RANK, w.shape[1])}
    first, second, third, fourth = tensors.values()
    return tensors, w + SCALE * (first @ second) * (third @ fourth)


def lokr(w, t):
    rows, columns = w.shape
    tensors = {
        "lokr_w1": t(2, 4),
        "lokr_w2_a": t(rows // 2, RANK),
        "lokr_w2_b": t(RANK, columns // 4),
    }
    whole, a, b = tensors.values()
    return tensors, w + SCALE * torch.kron(whole, a @ b)


def lokr_of_a_split_first(w, t):
    rows, columns = w.shape
    tensors = {
        "lokr_w1_a": t(8, RANK),
        "lokr_w1_b": t(RANK, 8),
        "lokr_w2": t(rows // 8, columns // 8),
    }
    a, b, whole = tensors.values()
    return tensors, w + SCALE * torch.kron(a @ b, whole)


def lokr_of_whole_matrices(w, t):
    """LyCORIS does not scale it."""
    tensors = {"lokr_w1": t(2, 4), "lokr_w2": t(w.shape[0] // 2, w.shape[1] // 4)}
    return tensors, w + torch.kron(*tensors.values())


def glora(w, t):
    rows, columns = w.shape
    shapes = {
        "a1": (columns, RANK),
        "a2": (RANK, columns),
        "b1": (rows, RANK),
        "b2": (RANK, columns),
    }
    tensors = {f"{name}.weight": t(*shape) for name, shape in shapes.items()}
    a1, a2, b1, b2 = tensors.values()
    return tensors, w + SCALE * (w @ a1 @ a2 + b1 @ b2)


def glora_of_older_lycoris(w, t):
    rows, columns = w.shape
    shapes = {
        "a1": (RANK, columns),
        "a2": (columns, RANK),
        "b1": (RANK, columns),
        "b2": (rows, RANK),
    }
    tensors = {f"{name}.weight": t(*shape) for name, shape in shapes.items()}
    a1, a2, b1, b2 = tensors.values()
    return tensors, w + SCALE * (w @ a2 @ a1 + b2 @ b1)


def rotation(blocks: Tensor) -> Tensor:
    """Cayley's map of the skew part, as LyCORIS defines OFT; alpha limits its size."""
    skew = blocks - blocks.mT
    skew = skew * min(1.0, ALPHA / skew.norm())
    eye = torch.eye(blocks.shape[-1])
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def oft(w, t):
    blocks = t(w.shape[0] // 8, 8, 8)
    turned = rotation(blocks).mT @ w.view(-1, 8, w.shape[1])
    return {"oft_blocks": blocks}, turned.reshape(w.shape)


def boft(w, t):
    """Of one factor: pairs of rows of blocks are turned as they lie."""
    blocks, rescale = t(1, w.shape[0] // 8, 8, 8), t(w.shape[0], 1) + 1
    turned = rotation(blocks)[0] @ _interleaved(w).view(-1, 8, w.shape[1])
    back = turned.reshape(-1, 4, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
    return {"oft_blocks": blocks, "rescale": rescale}, back * rescale


def _interleaved(w: Tensor) -> Tensor:
    return w.view(-1, 2, 4, w.shape[1]).transpose(1, 2).reshape(w.shape)


def difference(w, t):
    return {"diff": (d := t(*w.shape))}, w + d


def norm_difference(w, t):
    return {"w_norm": (d := t(*w.shape))}, w + d


def whole_weight(w, t):
    return {"set_weight": (new := t(*w.shape))}, new


def lora_with_core(w, t):
    """LoCon's `lora_mid` of 1 x 1."""
    down, up, core = t(RANK, w.shape[1]), t(w.shape[0], RANK), t(RANK, RANK, 1, 1)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": core}
    return tensors, w + SCALE * up @ core[..., 0, 0] @ down


def loha_with_cores(w, t):
    tensors, halves = {}, []
    for i in "12":
        a, b, core = t(RANK, w.shape[0]), t(RANK, w.shape[1]), t(RANK, RANK, 1, 1)
        tensors |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b, f"hada_t{i}": core}
        halves.append(a.T @ core[..., 0, 0] @ b)
    return tensors, w + SCALE * halves[0] * halves[1]


KINDS = [
    lora, lora_of_kohya, dora_of_peft, dora_by_rows, dora_by_columns, loha, lokr,
    lokr_of_a_split_first, lokr_of_whole_matrices, glora, glora_of_older_lycoris, oft, boft,
    difference, norm_difference, whole_weight, lora_with_core, loha_with_cores,
]  # fmt: skip
UNSCALED = (difference, norm_difference, whole_weight)

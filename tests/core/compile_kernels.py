"""A program that compiles Triton's kernels for a GPU which need not be there.

It is a program because the interpreter, which the tests use, is chosen when Triton is imported.
"""

from collections.abc import Mapping

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from glm_core.ar.kernels import attention, norms, pointwise, projection
from glm_core.decoder.kernels import modulation, rotation

# The hub's sizes. Names that are in neither list are tensors in bf16.
TYPES = {
    "position": "*i64", "first": "*i64", "partial": "*fp32", "peaks": "*fp32", "sums": "*fp32",
    "after_eps": "fp32", "following_eps": "fp32", "scale": "fp32", "eps": "fp32",
} | dict.fromkeys(
    ("length", "width", "kv_heads", "span", "parts", "kind_stride", "batch_stride", "head_stride",
     "row_stride", "vector_stride", "text", "rope_batch", "rope_row", "key_batch", "key_head",
     "key_row", "value_batch",
     "value_head", "value_row", "q_width", "k_width", "v_width", "rows", "keys_from",
     "values_from"),
    "i32",
)  # fmt: skip
KERNELS = {
    norms._add_norm_kernel: {"WIDTH": 4096, "BLOCK": 4096, "NORMS": 2},
    pointwise._gate_kernel: {"BLOCK": pointwise.GATE_BLOCK},
    pointwise._rotate_write_kernel: {
        "HEADS": 32, "KV_HEADS": 2, "HALF": 32, "WIDTH": 128, "BLOCK": 128
    },
    attention._attend_kernel: {
        "SHARING": 16, "ROWS": 16, "WIDTH": 128, "BLOCK": 128,
        "PART": attention.PART["tf32"], "PRECISION": "tf32", "PADDED": True,
    },
    attention._merge_kernel: {
        "SHARING": 16, "WIDTH": 128, "BLOCK": 128, "PART": attention.PART["tf32"],
        "MERGED": attention.MERGED, "PADDED": True,
    },
    projection._project_kernel: {
        "WIDTH": 4096, "BIASED": True, "ROWS": projection.ROWS, "FEATURES": projection.FEATURES,
        "COLUMNS": projection.COLUMNS, "PRECISION": "tf32",
    },
    modulation._modulate_kernel: {"WIDTH": 4096, "BLOCK": 4096, "FIRST": 6, "GATED": True},
    rotation._norm_rotate_kernel: {"HEADS": 32, "ROWS": 32, "WIDTH": 128, "BLOCK": 128},
}  # fmt: skip
TABLES = {rotation._norm_rotate_kernel: ("cos", "sin")}
"""Tensors in float32 under names that are of bf16 elsewhere."""


def compile_for(target: GPUTarget, kernel: triton.JITFunction, constants: Mapping) -> str:
    """The kernel's PTX."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, "*bf16") for name in names
    } | dict.fromkeys(TABLES.get(kernel, ()), "*fp32")
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    return triton.compile(source, target=target, options={"num_warps": 4}).asm["ptx"]


if __name__ == "__main__":
    for kernel, constants in KERNELS.items():
        assert "sm_90" in compile_for(GPUTarget("cuda", 90, 32), kernel, constants)
        print(kernel.__name__)

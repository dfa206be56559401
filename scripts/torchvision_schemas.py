"""Lets torchvision import beside a torch that lacks its compiled operators.

The index has no CPU build of torchvision; the one it has, beside a CPU build of torch, fails on
import because the operators it registers fakes for do not exist. Their schemas are declared here
just before torchvision is first imported, so torch itself is not imported any earlier than asked.
"""

import sys

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class SchemaFinder:
    """A finder that finds nothing: it declares the schemas once and steps aside."""

    @classmethod
    def find_spec(cls, name: str, path=None, target=None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(cls)
            import torch

            for operator in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, operator):
                    torch.library.define(f"torchvision::{operator}", SCHEMA)


sys.meta_path.insert(0, SchemaFinder)

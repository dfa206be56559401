"""Lets torchvision import beside a torch that lacks its compiled operators.

The index has no CPU build of torchvision; the one it has, beside a CPU build of torch, fails on
import because the operators it registers fakes for do not exist. Copied into an environment and
imported at its start, this declares their schemas when torchvision is imported, and not before:
neither it nor a mere look for torchvision imports torch.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class SchemaLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        import torch

        for operator in OPERATORS:
            if not hasattr(torch.ops.torchvision, operator):
                torch.library.define(f"torchvision::{operator}", SCHEMA)
        super().exec_module(module)


class SchemaFinder:
    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = SchemaLoader(name, spec.origin)
        return spec


sys.meta_path.insert(0, SchemaFinder)

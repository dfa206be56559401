"""Processes that train a stage together on a CPU, each on its own batches.

All take the same step along the mean of their gradients, so two processes train like one with twice
the batch. The first process saves the state and writes the trained component.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(processes: int) -> None:
    """Restart this command in `processes` processes, or join the others in one of them."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    elif processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = ["-m", *launcher, "-m", "--", "training", *sys.argv[1:]]
        os.execv(sys.executable, [sys.executable, *command])


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def meet() -> None:
    """Wait until all processes have reached this call."""
    if dist.is_initialized():
        dist.barrier()


def furthest(progress: float) -> float:
    """The largest of the processes' values."""
    if not dist.is_initialized():
        return progress
    value = torch.tensor(progress, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def share_gradients(module: nn.Module) -> None:
    """Replace each gradient by its mean over the processes; a missing one counts as 0."""
    if not dist.is_initialized():
        return
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    mean = torch.cat([_gradient(parameter).flatten() for parameter in trained])
    dist.all_reduce(mean)
    mean /= count()
    for parameter, part in zip(trained, mean.split([p.numel() for p in trained]), strict=True):
        parameter.grad = part.view_as(parameter)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

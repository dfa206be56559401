"""The training loop of all stages: seeded, resumable, with a progress bar and a plot.

A `Stage` has a module, a loss for the batch of a step, and a method that writes the result. Step
`i` draws its batch and its noise from (seed, stage, i), so an interrupted run continues as if it
had not been interrupted. The learning rate and some stages' batches also depend on the progress.
With `minutes` the clock measures it, and no two runs are alike.
"""

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from . import parallel
from .muon import Muon

SAVE_EVERY = 120  # seconds
STAGES = {  # module: class, in the order of training
    "vae": "VAEStage",
    "autoregressive": "AutoregressiveStage",
    "vision": "VisionStage",
    "glyphs": "GlyphStage",
    "decoder": "DecoderStage",
}


class FolderInUseError(Exception):
    """Another run trains a stage in the same folder."""


@dataclass(frozen=True)
class Run:
    """The folder and settings of a training run.

    start: a checkpoint with the weights to start from; None starts from initial weights.
    steps: optimiser steps in all; None takes the stage's own number.
    minutes: ends the stage after this time, over which the learning rate falls.
    stop: interrupts the stage before this step, to be resumed later.
    bf16: products in bfloat16 (autocast), two to three times faster on some processors.
    compile: compiles the AR model with torch, which needs a C++ compiler.
    """

    folder: Path
    start: Path | None = None
    seed: int = 0
    device: str = "cpu"
    steps: int | None = None
    minutes: float | None = None
    batch: int | None = None
    stop: int | None = None
    bf16: bool = False
    compile: bool = False

    @property
    def snapshot(self) -> Path:
        """The folder that stages write their components to, in hub layout."""
        return self.folder / "snapshot"

    def component(self, name: str, stage: str) -> Path:
        """The folder of a component that another stage has written, or that of the start.

        Raises:
            FileNotFoundError: the stage has not been trained.
        """
        folders = [self.snapshot / name, *([self.start / name] if self.start else [])]
        if found := next(filter(Path.is_dir, folders), None):
            return found
        raise FileNotFoundError(f"{folders[0]} is missing: train the stage {stage} first.")


class Stage(ABC):
    """One network's training. Subclasses set the class attributes and define four methods.

    `keys` maps names of weights: pairs of a prefix in the component and its prefix in the module.
    """

    name: str
    component: str
    keys: tuple[tuple[str, str], ...]
    steps: int
    batch: int
    learning_rate = 2e-3
    weight_decay = 0.01
    by_adamw: tuple[str, ...] = ()  # parts of the names of linear layers that AdamW trains
    ema = 0.0  # decay of the averaged weights that are written; 0 writes the last weights

    def __init__(self, run: Run) -> None:
        self.run = run
        self.batch_size = run.batch or self.batch
        torch.manual_seed(run.seed)
        self.module = self.build().to(run.device)

    @property
    def folder(self) -> Path:
        """The folder of the stage's state, plot and summary."""
        return self.run.folder / self.name

    @abstractmethod
    def build(self) -> nn.Module:
        """The module whose parameters are trained."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, progress: float) -> Any:
        """One step's batch, on the CPU; `progress` runs from 0 to 1."""

    @abstractmethod
    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Named losses; their sum is minimised."""

    @abstractmethod
    def write(self) -> None:
        """Save the trained component to `run.snapshot` in hub layout."""

    def start_from(self, snapshot: Path) -> None:
        """Load the weights of a checkpoint; auxiliary heads, which it lacks, start anew.

        Raises:
            ValueError: the checkpoint has a weight that the module does not have.
        """
        (file,) = (snapshot / self.component).glob("*.safetensors")
        weights = {
            module_prefix + name.removeprefix(file_prefix): weight
            for name, weight in load_file(file).items()
            for file_prefix, module_prefix in self.keys
            if name.startswith(file_prefix)
        }
        unexpected = self.module.load_state_dict(weights, strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"{file} is of another network: it has {unexpected[0]}.")

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """Muon for the hidden layers' matrices, AdamW for all other parameters."""
        linears = {
            f"{name}.weight": module.weight
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear) and not any(part in name for part in self.by_adamw)
        }
        trained = {k: p for k, p in self.module.named_parameters() if p.requires_grad}
        hidden = [p for name, p in trained.items() if name in linears]
        others = [p for name, p in trained.items() if name not in linears]
        optimisers = [torch.optim.AdamW(others, self.learning_rate, (0.9, 0.98), weight_decay=0.0)]
        if hidden:
            optimisers.append(Muon(hidden, self.learning_rate, self.weight_decay))
        return optimisers


def train(stage: Stage) -> None:
    """Train a stage from its saved state to its end, then write its component and its plot.

    A stage that has reached its steps or minutes is only written again.

    Raises:
        FolderInUseError: another run trains the stage in this folder.
    """
    stage.folder.mkdir(parents=True, exist_ok=True)
    with _locked(stage.folder) if parallel.rank() == 0 else nullcontext():
        _train(stage)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise FolderInUseError(
            f"{folder} is being trained by another run: wait until it ends."
        ) from None


def _train(stage: Stage) -> None:
    run, folder = stage.run, stage.folder
    if run.start and not (folder / "state.pt").exists():
        stage.start_from(run.start)
    optimisers = stage.optimisers()
    average = _Average(stage.module, stage.ema)
    state = _load(folder, stage.module, optimisers, average)
    steps = run.steps or stage.steps
    last = steps if run.stop is None else min(steps, run.stop)
    clock = _Clock(state["seconds"], None if run.minutes is None else 60 * run.minutes)
    saved = time.monotonic()
    first = parallel.rank() == 0
    bar = tqdm(
        total=steps, initial=state["step"], desc=stage.name, mininterval=5, disable=not first
    )
    for step, batch in _batches(stage, state["step"], last, steps, clock):
        progress = parallel.furthest(max(step / steps, clock.progress))
        if progress >= 1:
            last = steps
            break
        losses = _step(stage, optimisers, batch, step, progress)
        average.update()
        state["log"].append({"step": step, **losses})
        state["step"], state["seconds"] = step + 1, clock.seconds
        bar.set_postfix({k: f"{v:.4f}" for k, v in losses.items()}, refresh=False)
        bar.update()
        if first and time.monotonic() - saved > SAVE_EVERY:
            _save(folder, stage.module, optimisers, average, state)
            saved = time.monotonic()
    bar.close()
    if first:
        _save(folder, stage.module, optimisers, average, state)
        if last == steps:
            average.apply()
            _finish(stage, state)
    parallel.meet()


def _step(
    stage: Stage, optimisers: list[torch.optim.Optimizer], batch: Any, step: int, progress: float
) -> dict[str, float]:
    """The losses of a batch, on which one optimiser step is taken."""
    for group in chain.from_iterable(each.param_groups for each in optimisers):
        group["lr"] = stage.learning_rate * _schedule(step, progress)
    seed = np.random.SeedSequence(_key(stage, step))
    generator = torch.Generator(stage.run.device).manual_seed(int(seed.generate_state(1)[0]))
    bf16 = torch.autocast(torch.device(stage.run.device).type, torch.bfloat16, stage.run.bf16)
    with bf16:
        losses = stage.loss(batch, generator)
    stage.module.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    parallel.share_gradients(stage.module)
    nn.utils.clip_grad_norm_(stage.module.parameters(), 1.0)
    with bf16:
        for optimiser in optimisers:
            optimiser.step()
    return {name: float(value.detach()) for name, value in losses.items()}


def _key(stage: Stage, step: int) -> list[int]:
    """The seeds of a step; each process has its own."""
    rank = parallel.rank()
    return [stage.run.seed, *stage.name.encode(), step, *([rank] if rank else [])]


def _finish(stage: Stage, state: dict) -> None:
    if state["log"]:
        plot(state["log"], stage.folder / "loss.png", stage.name)
    stage.module.eval().requires_grad_(False)
    stage.write()
    summary = {"stage": stage.name, "steps": state["step"], "minutes": state["seconds"] / 60}
    summary |= {"batch": stage.batch_size, "processes": parallel.count()}
    summary |= {"seed": stage.run.seed, "device": stage.run.device}
    (stage.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


class _Clock:
    """Seconds of training over all runs of a stage, and their share of the allowed time."""

    def __init__(self, before: float, allowed: float | None) -> None:
        self.start, self.before, self.allowed = time.monotonic(), before, allowed

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    @property
    def progress(self) -> float:
        return self.seconds / self.allowed if self.allowed else 0.0


class _Average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.count = 0
        self.values = {k: v.detach().clone() for k, v in module.named_parameters()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        if not self.decay:
            return
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, parameter in self.module.named_parameters():
            self.values[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        for name, value in self.values.items():
            self.module.get_parameter(name).copy_(value)


def _schedule(step: int, progress: float) -> float:
    """The learning rate's factor: a linear warm-up of 100 steps, then a cosine down to 1 / 20."""
    return min(1, (step + 1) / 100) * (
        0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1)))
    )


def _batches(
    stage: Stage, first: int, last: int, steps: int, clock: _Clock
) -> Iterator[tuple[int, Any]]:
    """(step, batch) in order; each batch is drawn while the step before it is computed."""

    def draw(step: int) -> Any:
        rng = np.random.default_rng(_key(stage, step))
        return stage.draw(rng, max(step / steps, clock.progress))

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(draw, first) if first < last else None
        for step in range(first, last):
            batch = ahead.result()
            ahead = pool.submit(draw, step + 1) if step + 1 < last else None
            yield step, batch


def _save(
    folder: Path, module: nn.Module, optimisers: list, average: _Average, state: dict
) -> None:
    content = {"module": module.state_dict(), **state}
    content["optimisers"] = [optimiser.state_dict() for optimiser in optimisers]
    content |= {"average": average.values, "count": average.count}
    torch.save(content, folder / "state.part")
    os.replace(folder / "state.part", folder / "state.pt")


def _load(folder: Path, module: nn.Module, optimisers: list, average: _Average) -> dict:
    path = folder / "state.pt"
    if not path.exists():
        return {"step": 0, "seconds": 0.0, "log": []}
    content = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(content["module"])
    for optimiser, saved in zip(optimisers, content["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    for name, value in content["average"].items():
        average.values[name].copy_(value)
    average.count = content["count"]
    return {key: content[key] for key in ("step", "seconds", "log")}


def plot(log: list[dict], path: Path, title: str) -> None:
    """Save a PNG of the losses over the steps."""
    figure = Figure(figsize=(6, 4), layout="tight")
    axes = figure.subplots()
    for name, (steps, values) in curves(log).items():
        axes.plot(steps, values, label=name)
    axes.set(title=title, xlabel="step", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=100)


def curves(log: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each loss, both averaged over a fiftieth of the steps that have it."""
    found = {}
    for name in dict.fromkeys(key for entry in log for key in entry if key != "step"):
        points = np.array([(entry["step"], entry[name]) for entry in log if name in entry])
        width = max(1, len(points) // 50)
        window = np.ones(width) / width
        found[name] = tuple(np.convolve(axis, window, "valid") for axis in points.T)
    return found

"""`make simulated-cards`: memory of a full-size run on simulated cards of 24, 16, 12 and 8 GiB.

The server's device (`tests/simulated`) has sizes and no numbers, so networks of the real size run
on any machine. It counts the weights that the host loads and streams, and what every operation
allocates, but no workspaces of kernels and no slack of an allocator. The AR model is stopped after
a few tokens, since its KV cache is allocated for all tokens before the first.
"""

import json
import math
import shutil
import struct
import sys
from pathlib import Path

import torch
from torch import Tensor

from glm_core.ar.model import ARConfig, ARModel
from glm_core.data.token_file import save_tokens
from glm_core.data.tokens import SemanticTokens
from glm_core.decoder.model import Decoder, DecoderConfig
from glm_core.glyph.encoder import GlyphConfig, GlyphEncoder
from glm_core.placement.plan import GIB
from glm_core.vae import AutoencoderKL, VAEConfig

from . import demo, environment, host
from .client import Client, Event, Prompt

SIMULATED = environment.ROOT / "tests" / "simulated"
HUB = environment.ROOT / "tests" / "configs" / "hub"
BASE = environment.CACHE / "simulated-cards"
CARDS = (24, 16, 12, 8)
SIDE = 1024
MOST_TOKENS = 8  # after which the AR model is stopped
PARTS = {
    "vision_language_encoder": ("model", torch.bfloat16, ARModel, ARConfig),
    "transformer": ("diffusion_pytorch_model", torch.bfloat16, Decoder, DecoderConfig),
    "text_encoder": ("model", torch.float32, GlyphEncoder, GlyphConfig),
    "vae": ("diffusion_pytorch_model", torch.bfloat16, AutoencoderKL, VAEConfig),
}
"""The folders of the hub's snapshot: file, weights' dtype, network and its config."""


def main(cards: list[float]) -> None:
    base = host.make_base(BASE)
    model = write_checkpoint(base / "models" / "glm_image" / "Full-Size")
    write_tokens(base / "input" / "tokens.safetensors")
    pack = base / "custom_nodes" / "simulated_npu"
    pack.unlink(missing_ok=True)
    pack.symlink_to(SIMULATED / pack.name)
    accelerator = {"PYTHONPATH": str(SIMULATED), "NPU_BYTES": str(80 * GIB), "NPU_EMPTY": "1"}
    print("| card | AR model | decoder | VAE |\n|---|---|---|---|")
    for gib in cards or CARDS:
        with host.serve(environment.host(), base, accelerator=accelerator) as address:
            peaks = Card(Client(address), int(gib * GIB)).peaks(model)
            print(f"| {gib:g} |", " | ".join(f"{peak:.1f}" for peak in peaks), "|", flush=True)


class Card:
    """The server's device, with the memory of one card."""

    def __init__(self, client: Client, size: int, path: str = "/npu") -> None:
        """path: where the server tells its memory and takes a size."""
        self._client = client
        self._size = size
        self._path = path

    def peaks(self, model: str, side: int = SIDE) -> tuple[float, float, float]:
        """Peaks in GiB while the AR model, the decoder and the VAE run, including models that are
        still loaded."""
        prompt = json.loads(demo.WORKFLOW.read_text())
        size = {"width": side, "height": side, "steps": 1}
        demo.set_inputs(prompt, {"model_name": model, "seed": self._size, **size})
        sampler = next(k for k, node in prompt.items() if "SampleTokens" in node["class_type"])
        return (self._ar(prompt), *self._decoder_and_vae(prompt, sampler))

    def _ar(self, prompt: Prompt) -> float:
        self._reset_peak()
        peaks: list[float] = []

        def stop(event: Event) -> None:
            if event["type"] == "progress" and event["data"]["value"] >= MOST_TOKENS and not peaks:
                peaks.append(self._peak())
                self._client.interrupt()

        self._client.run(prompt, stop)
        return peaks[0]

    def _decoder_and_vae(self, prompt: Prompt, sampler: str) -> tuple[float, float]:
        """The peaks of both, with tokens from a file."""
        node = {"class_type": "GLMImageLoadTokens", "inputs": {"file": "tokens.safetensors"}}
        prompt[sampler] = node
        running, peaks = "", {}
        self._client.unload_models(lambda: self._memory()[0] <= GIB, timeout_s=300)

        def note_peak(event: Event) -> None:
            nonlocal running
            if event["type"] == "executing":
                peaks[running] = self._peak()
                self._reset_peak()
                running = event["data"]["node"]

        self._client.run(prompt, note_peak)
        by_type = {prompt[key]["class_type"]: peak for key, peak in peaks.items() if key}
        return by_type["GLMImageDecode"], by_type["VAEDecode"]

    def _reset_peak(self) -> None:
        self._client.post(self._path, [self._size])

    def _peak(self) -> float:
        return self._memory()[1] / GIB

    def _memory(self) -> tuple[int, int]:
        """Bytes in use, and the most since `_reset_peak`."""
        ((in_use, peak),) = json.loads(self._client.get(self._path))
        return in_use, peak


def write_checkpoint(folder: Path) -> str:
    """Write a snapshot of the hub's sizes whose files have no data; returns its name."""
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(demo.TINY, folder, ignore=ignored, dirs_exist_ok=True)
    for part, (file, dtype, network, read) in PARTS.items():
        config = json.loads((HUB / f"{part}_config.json").read_text())
        (folder / part / "config.json").write_text(json.dumps(config))
        with torch.device("meta"):
            state = network(read.from_dict(config)).state_dict()
        _write_empty(folder / part / f"{file}.safetensors", state, dtype)
    return folder.name


def _write_empty(path: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """A safetensors file of zeros that takes no disk: a header, and a hole in place of the data."""
    header, end = {}, 0
    name = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    for key, tensor in state.items():
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_tokens(path: Path, side: int = SIDE, snapshot: Path | None = None) -> None:
    """Write tokens for the hub's model, or for that of a snapshot's folder."""
    config = HUB / "vision_language_encoder_config.json"
    if snapshot is not None:
        config = snapshot / "vision_language_encoder" / "config.json"
    codes = json.loads(config.read_text())["vq_config"]["num_embeddings"]
    grid = torch.zeros(1, side // 32, side // 32, dtype=torch.int32)
    save_tokens(path, SemanticTokens(grid, codes, side, side, {}))


if __name__ == "__main__":
    main([float(size) for size in sys.argv[1:]])

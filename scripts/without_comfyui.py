"""Text to image with `glm_core` alone, from a snapshot's folder to a PNG.

python -m scripts.without_comfyui tiny "a red circle" out.png --width 512 --height 512
"""

import argparse
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from glm_core.ar.model import ARConfig, ARModel
from glm_core.ar.prompt import PromptTokenizer
from glm_core.ar.sampler import SamplingRun, sample_tokens
from glm_core.ar.step import SamplingOptions
from glm_core.data.grids import PIXELS_PER_LATENT, Size, token_grid, upsample_tokens
from glm_core.decoder.model import DROPPED, Decoder, DecoderConfig
from glm_core.decoder.schedule import ScheduleConfig
from glm_core.files.loading import load_network
from glm_core.files.opening import open_component
from glm_core.glyph.encoder import GlyphConfig, GlyphEncoder
from glm_core.glyph.texts import encode_texts, texts_to_render
from glm_core.vae import AutoencoderKL, VAEConfig
from glm_core.vision.encoder import VISION_PREFIXES


@dataclass(frozen=True)
class TextToImage:
    """A picture to be made. Each stage frees its network before the next one loads its own."""

    snapshot: str
    prompt: str
    size: Size
    steps: int
    cfg: float
    seed: int
    device: torch.device
    dtype: torch.dtype

    def paint(self) -> Tensor:
        """float32 [3, height, width], 0 to 1"""
        tokens = self.write_tokens()
        glyphs, no_glyphs = self.encode_glyphs()
        latents = self.denoise(tokens, glyphs, no_glyphs)
        return self.decode(latents)

    def write_tokens(self) -> Tensor:
        """The AR model writes a small preview, then one semantic token per 32 x 32 pixels."""
        ar = open_component(self.snapshot, "ar")
        model = load_network(ARModel, ARConfig, ar, self.device, self.dtype, VISION_PREFIXES)
        files = ar.processor
        tokenizer = PromptTokenizer(files.tokenizer, files.tokenizer_config, files.chat_template)
        grid = token_grid(*self.size)
        prompt = tokenizer.text_to_image(self.prompt, grid)
        run = SamplingRun((self.seed,), SamplingOptions(), self.device, self.dtype)
        tokens, _preview = sample_tokens(model, prompt, grid, run)
        return tokens  # [1, height / 32, width / 32]

    def encode_glyphs(self) -> tuple[Tensor, Tensor]:
        """The glyph encoder reads the bytes of the quoted texts, and those of no text."""
        glyph = open_component(self.snapshot, "glyph")
        encoder = load_network(GlyphEncoder, GlyphConfig, glyph, self.device, self.dtype)
        glyphs = encode_texts(encoder, texts_to_render(self.prompt), self.device)
        return glyphs, encode_texts(encoder, [], self.device)  # each [1, bytes, channels]

    def denoise(self, tokens: Tensor, glyphs: Tensor, no_glyphs: Tensor) -> Tensor:
        """The decoder turns noise into latents, in Euler steps with guidance."""
        component = open_component(self.snapshot, "decoder")
        decoder = load_network(Decoder, DecoderConfig, component, self.device, self.dtype)

        # The unconditional pass has neither text nor tokens: an empty string and dropped cells.
        ids = upsample_tokens(tokens)
        dropped = torch.full_like(ids, DROPPED)
        conditional = decoder.prepare(glyphs, ids, self.size, self.dtype)
        unconditional = decoder.prepare(no_glyphs, dropped, self.size, self.dtype)

        # The shift raises the noise levels of larger images. The network takes the timesteps that
        # the levels had before the shift.
        schedule = ScheduleConfig.from_dict(component.scheduler)
        shift = schedule.shift(*self.size)
        sigmas = schedule.sigmas(self.steps, shift)
        timesteps = schedule.timestep(sigmas, shift).to(self.device)

        rows, columns = (side // PIXELS_PER_LATENT for side in self.size)
        shape = (1, decoder.config.in_channels, rows, columns)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        latents = noise.to(self.device)
        for i in range(self.steps):
            x, timestep = latents.to(self.dtype), timesteps[i : i + 1]
            flow = decoder.predict(x, timestep, conditional).float()
            if self.cfg > 1:
                without = decoder.predict(x, timestep, unconditional).float()
                flow = without + self.cfg * (flow - without)
            latents = latents + (sigmas[i + 1] - sigmas[i]).item() * flow
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """The VAE turns latents into pixels, once the normalisation is undone."""
        component = open_component(self.snapshot, "vae")
        vae = load_network(AutoencoderKL, VAEConfig, component, self.device, self.dtype)
        mean = latents.new_tensor(vae.config.latents_mean).view(1, -1, 1, 1)
        std = latents.new_tensor(vae.config.latents_std).view(1, -1, 1, 1)
        pixels = vae.decode((latents * std + mean).to(self.dtype))
        return (pixels[0].float() / 2 + 0.5).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("snapshot", help="folder of a hub snapshot, such as tiny")
    parser.add_argument("prompt")
    parser.add_argument("out", help="the PNG to write")
    parser.add_argument("--width", type=int, default=1024, help="a multiple of 32")
    parser.add_argument("--height", type=int, default=1024, help="a multiple of 32")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg", type=float, default=1.5, help="guidance; 1 is off")
    parser.add_argument("--device", type=torch.device, default=accelerator_or_cpu())
    args = parser.parse_args()

    dtype = torch.float32 if args.device.type == "cpu" else torch.bfloat16
    size = args.height, args.width
    picture = TextToImage(
        args.snapshot, args.prompt, size, args.steps, args.cfg, args.seed, args.device, dtype
    ).paint()
    levels = (picture * 255).round().to("cpu", torch.uint8)
    Image.fromarray(levels.permute(1, 2, 0).numpy()).save(args.out)


def accelerator_or_cpu() -> torch.device:
    available = torch.accelerator.is_available()
    return torch.accelerator.current_accelerator() if available else torch.device("cpu")


if __name__ == "__main__":
    main()

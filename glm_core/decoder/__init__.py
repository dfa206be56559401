"""The diffusion decoder: semantic tokens and glyphs in, latents out."""

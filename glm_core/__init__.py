"""GLM-Image's model, without a host: networks, sampling, grids, prompts, checkpoints, tokens."""

"""`make bench`: every stage against transformers and diffusers, on the same weights, in one run."""

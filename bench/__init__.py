"""`make bench`: every stage beside transformers and diffusers, on the same weights, in one run."""

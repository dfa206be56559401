"""The autoregressive model: a prompt in, semantic tokens out."""

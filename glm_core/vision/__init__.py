"""The AR model's vision tower: pictures in, semantic tokens out."""

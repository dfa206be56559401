"""The glyph encoder: the texts to render in, one vector a byte out."""

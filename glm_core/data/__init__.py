"""Grids, tokens, layouts and references: what passes between the stages."""

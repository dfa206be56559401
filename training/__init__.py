"""Trains `tiny/`, a small GLM-Image, on pictures that this package draws itself."""

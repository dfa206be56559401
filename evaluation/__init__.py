"""Measures whether a trained model paints what its prompts ask for."""

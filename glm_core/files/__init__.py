"""Checkpoints, converted files and LoRAs on disk."""

"""Checkpoints in one file."""

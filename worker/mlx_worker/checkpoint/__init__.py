"""Durable checkpoints: what is in one, how it is written, when, and how it is read back."""

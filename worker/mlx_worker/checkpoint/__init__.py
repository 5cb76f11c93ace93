"""Durable checkpoints: their content, when they are due, writing and reading them."""

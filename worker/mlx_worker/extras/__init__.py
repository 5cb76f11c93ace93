"""What a checkpoint has besides weights and optimizer, and how it is restored."""

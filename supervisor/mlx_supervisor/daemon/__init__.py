"""The supervisor process: connects event sources, machines and adapters."""

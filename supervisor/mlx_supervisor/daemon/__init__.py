"""The supervisor process: joins sources, machines and adapters."""

"""The settings file: its keys, its rules, and what becomes of it (policy for the core, job for the worker)."""

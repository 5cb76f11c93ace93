"""The command lines. What is slow to import stays in here."""

"""The command lines. Libraries that are slow to import are used only in here."""

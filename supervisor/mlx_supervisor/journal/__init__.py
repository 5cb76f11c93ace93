"""The SQLite journal that survives the supervisor."""

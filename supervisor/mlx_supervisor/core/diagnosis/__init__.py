"""Names the cause of every death."""

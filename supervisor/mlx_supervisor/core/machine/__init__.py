"""The state machine of a run: its states, what each event does in each, and the current generation."""

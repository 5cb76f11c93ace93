"""What follows a generation: the batch, the next rung of the escalation ladder, and when to give up."""

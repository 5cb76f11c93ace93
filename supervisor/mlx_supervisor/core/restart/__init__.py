"""What follows a generation: the batch, the next rung of the ladder, and when to give up."""

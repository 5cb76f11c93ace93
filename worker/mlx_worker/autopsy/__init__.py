"""What grew in this process, and what refers to it."""

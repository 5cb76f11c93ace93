"""When memory is read: each worker's, and the machine's."""

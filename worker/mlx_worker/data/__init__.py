"""The order of the samples, and the batches cut from it."""

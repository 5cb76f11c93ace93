"""Code that the benchmarks share; none of it is a benchmark."""

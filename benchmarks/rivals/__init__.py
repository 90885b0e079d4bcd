"""What `benchmarks.total_time` runs, each in a process of its own, some in another environment."""

"""The benchmarks, a file each: its files, its prompts, and how its answers are read."""

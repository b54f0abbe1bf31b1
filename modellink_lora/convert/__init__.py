"""Translating, resharding, merging and exporting checkpoints: a printable plan, then its execution tensor by tensor."""

"""What a run tells: lines, metrics, time split, record and report."""

"""What `doctor` looks at on a machine and on the way between machines, and what it makes of it."""

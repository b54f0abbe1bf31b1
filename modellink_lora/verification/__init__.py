"""The self-check of a setup on the user's own model and devices."""

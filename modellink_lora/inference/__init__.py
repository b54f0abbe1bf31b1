"""Forward passes without training: what a model answers at the layout it was trained on."""

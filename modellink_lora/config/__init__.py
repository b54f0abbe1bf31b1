"""Layer 0: frozen dataclasses that hold every setting. Standard library only; no file, device or process group."""

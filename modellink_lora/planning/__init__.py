"""What a layout costs before it runs: memory, time, and the layouts that fit."""

"""Test-only simulator of an Ascend NPU in host memory; see README.md."""

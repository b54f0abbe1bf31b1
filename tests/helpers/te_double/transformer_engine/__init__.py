"""A double of Transformer Engine for tests on a CPU; see the README beside this package."""

from transformer_engine import common, pytorch

__version__ = "2.6.0+double"
__all__ = ["common", "pytorch"]

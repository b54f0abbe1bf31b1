"""Names that megatron-core derives from; nothing here runs in fp8."""

from __future__ import annotations

import types


class DelayedScaling:
    """fp8's delayed scaling: not done by the double."""


recipe = types.SimpleNamespace(DelayedScaling=DelayedScaling)

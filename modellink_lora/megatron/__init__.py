"""The versions of megatron-core: which were tried, and the one place for what differs between them."""

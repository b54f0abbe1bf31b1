"""LoRA on megatron-core's parallel linears: the layer, where it goes, and how it is merged."""

"""How bytes lie on disk: Megatron rank files, Hugging Face folders, adapters."""

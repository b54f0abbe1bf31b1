"""LoRA fine-tuning of large language models on Megatron-style parallelism. Importing this package changes nothing."""

__version__ = "0.1.0"

"""What a model is made of: tensor layouts and family tables (pure), and the megatron-core model built from them."""

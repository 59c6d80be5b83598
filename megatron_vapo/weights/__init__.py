"""Weights between layouts: Hugging Face folders, Megatron's shards, the rollout engine's."""

from transformer_engine.pytorch.attention import rope  # noqa: F401

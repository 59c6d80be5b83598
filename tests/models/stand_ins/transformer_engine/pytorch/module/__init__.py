from transformer_engine.pytorch.module import base  # noqa: F401

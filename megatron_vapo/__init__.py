"""VAPO (arXiv 2504.05118) on Megatron Core and SGLang."""

__version__ = "0.1.0"

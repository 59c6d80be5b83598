"""A stand-in for Transformer Engine, which cannot be imported without CUDA: its modules' constructors, parameter names
and extra states (as of 2.20.2), computed by torch and Megatron's own collectives. With it Megatron's real wrappers,
layer specs and checkpoint keys of Transformer Engine run on CPU. No kernel of Transformer Engine is imitated."""

from transformer_engine import common, pytorch  # noqa: F401

__version__ = "2.20.2"

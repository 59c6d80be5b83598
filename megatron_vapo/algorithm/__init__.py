"""The mathematics of VAPO on packed tensors: torch alone, nothing of Megatron."""

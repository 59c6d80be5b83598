import torch


def apply_rotary_pos_emb(t, freqs, tensor_format, fused, cu_seqlens, cp_size, cp_rank, interleaved=False):
    """Rotation of halves, positions counted anew in each packed sequence."""
    assert tensor_format == "thd" and fused and cp_size == 1 and not interleaved
    angles = torch.cat([freqs[:length, 0] for length in cu_seqlens.diff().tolist()])
    first, second = t.chunk(2, dim=-1)
    return (t * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()).to(t.dtype)

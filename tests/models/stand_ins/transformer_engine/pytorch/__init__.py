import torch
from torch.nn.functional import linear, rms_norm

from transformer_engine.pytorch import attention, distributed, fp8, module, ops, tensor  # noqa: F401
from transformer_engine.pytorch.fp8 import fp8_autocast  # noqa: F401


def mappings():
    """Megatron imports this package before it can be imported itself."""
    from megatron.core import tensor_parallel

    return tensor_parallel


class _Module(torch.nn.Module):
    """Every module of Transformer Engine has extra state: an empty tensor where nothing is delayed-scaled."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or state.numel() == 0

    def _cache(self, name, weight, is_first_microbatch):
        """As Transformer Engine 2.20 (linear.py, `cache_name`): FP8 copies of weights stay until someone drops them."""
        if fp8.FP8GlobalStateManager.is_fp8_enabled() and is_first_microbatch is not None:
            self.__dict__.setdefault("_fp8_workspaces", {})[name] = weight.detach().to(torch.float8_e4m3fn)


def _mark(parameter, dim):
    """Transformer Engine marks weights as tensor-parallel whatever the size."""
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1


class Linear(_Module):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel,
        fuse_wgrad_accumulation,
        tp_group,
        tp_size,
        get_rng_state_tracker,
        init_method,
        bias,
        return_bias,
        parallel_mode,
        params_dtype,
        device,
        rng_tracker_name=None,
    ):
        super().__init__()
        assert device == "cpu" and not return_bias
        self.save_original_input = False
        self._group, self._mode, self.sequence_parallel = tp_group, parallel_mode, sequence_parallel
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self.weight = torch.nn.Parameter(torch.full((rows, columns), torch.nan, dtype=params_dtype))
        self.use_bias = bias
        if bias:
            self.bias = torch.nn.Parameter(torch.full((rows,), torch.nan, dtype=params_dtype))
            _mark(self.bias, 0)
        _mark(self.weight, 1 if parallel_mode == "row" else 0)
        self.in_features, self.out_features = columns, rows

    def forward(self, x, is_first_microbatch=None):
        if self._mode == "column":
            if self.sequence_parallel:
                x = mappings().gather_from_sequence_parallel_region(x, group=self._group)
            else:
                x = mappings().copy_to_tensor_model_parallel_region(x, group=self._group)
        self.seen = (fp8.FP8GlobalStateManager.recipe, x.shape[0])
        self._cache("weight", self.weight, is_first_microbatch)
        out = linear(x, self.weight, self.bias if self.use_bias else None)
        if self._mode == "row":
            if self.sequence_parallel:
                return mappings().reduce_scatter_to_sequence_parallel_region(out, group=self._group)
            return mappings().reduce_from_tensor_model_parallel_region(out, group=self._group)
        return out


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, eps, return_layernorm_output, zero_centered_gamma, **rest):
        normalization = rest.pop("normalization")
        assert normalization == "RMSNorm" and not zero_centered_gamma and not return_layernorm_output
        super().__init__(in_features, out_features, **rest)
        self._eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.full((in_features,), torch.nan, dtype=rest["params_dtype"]))
        self.layer_norm_weight.sequence_parallel = rest["sequence_parallel"]

    def forward(self, x, is_first_microbatch=None):
        normed = rms_norm(x, (x.shape[-1],), self.layer_norm_weight, self._eps)
        return super().forward(normed, is_first_microbatch)


class RMSNorm(_Module):
    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        device=None,
    ):
        super().__init__()
        self._eps = eps
        self.weight = torch.nn.Parameter(torch.full((normalized_shape or hidden_size,), torch.nan, dtype=params_dtype))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x):
        return rms_norm(x, (x.shape[-1],), self.weight, self._eps)


class LayerNorm(RMSNorm):
    pass


class GroupedLinear(_Module):
    def __init__(
        self,
        num_gemms,
        in_features,
        out_features,
        sequence_parallel,
        fuse_wgrad_accumulation,
        tp_group,
        tp_size,
        get_rng_state_tracker,
        init_method,
        bias,
        return_bias,
        parallel_mode,
        params_dtype,
        device,
        ub_name,
        rng_tracker_name,
        single_grouped_weight=False,
        single_grouped_bias=False,
    ):
        super().__init__()
        assert tp_size == 1 and not bias and not single_grouped_weight
        self.num_gemms, self.use_bias = num_gemms, bias
        self.single_grouped_weight, self.single_grouped_bias = single_grouped_weight, single_grouped_bias
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False}, False, False
        for i in range(num_gemms):
            weight = torch.nn.Parameter(torch.full((out_features, in_features), torch.nan, dtype=params_dtype))
            self.register_parameter(f"weight{i}", weight)
            _mark(weight, 1 if parallel_mode == "row" else 0)

    def init_fp8_metadata(self, num_gemms):
        """Nothing is in FP8."""

    def forward(self, x, m_splits, is_first_microbatch=None):
        parts = x.split(m_splits)
        for i in range(self.num_gemms):
            self._cache(f"weight{i}", getattr(self, f"weight{i}"), is_first_microbatch)
        return torch.cat([linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)])


class DotProductAttention(_Module):
    """Causal attention over packed sequences, one after another, without context parallelism."""

    def __init__(self, num_attention_heads, kv_channels, attention_dropout, attn_mask_type, softmax_scale, **_):
        super().__init__()
        assert attn_mask_type == "causal" and attention_dropout == 0
        self._scale = softmax_scale

    def forward(self, query, key, value, attention_mask, **packed):
        assert packed["qkv_format"] == "thd" and packed["attn_mask_type"] == "padding_causal"
        assert packed["cu_seqlens_q_padded"] is None and "plan" not in packed
        lengths = packed["cu_seqlens_q"].diff().tolist()
        outputs = [
            torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(0, 1) for t in qkv), is_causal=True, scale=self._scale, enable_gqa=True
            )
            for qkv in zip(*(t.split(lengths) for t in (query, key, value)))
        ]
        return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)

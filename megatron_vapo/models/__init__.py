"""All that builds on megatron.core, which `runtime.cpu_backend.install` makes usable where there is no CUDA."""

from megatron_vapo.runtime import cpu_backend

cpu_backend.require()

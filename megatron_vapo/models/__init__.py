"""All that builds on megatron.core. Importing this room makes megatron.core usable where there is no CUDA."""

from megatron_vapo.models import cpu_backend

cpu_backend.install()

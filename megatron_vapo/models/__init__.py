"""All that builds on megatron.core. Importing this room makes megatron.core usable where there is no CUDA."""

from megatron_vapo.models import cpu_backend
from megatron_vapo.runtime.versions import check_megatron

check_megatron()
cpu_backend.install()

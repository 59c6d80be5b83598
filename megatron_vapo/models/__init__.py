"""All that builds on megatron.core. Importing this room makes megatron.core usable where there is no CUDA."""

from megatron_vapo.installation import check_megatron
from megatron_vapo.models import cpu_backend

check_megatron()
cpu_backend.install()

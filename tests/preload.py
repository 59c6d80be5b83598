"""What forked ranks need not import again (tests/ranks.py): the modules of training on a CPU."""

from importlib import import_module

from megatron_vapo.runtime import cpu_backend

cpu_backend.install()
for name in (
    "benchmarks.layout_cases",
    "matplotlib.figure",
    "megatron_vapo.commands.train",
    "megatron_vapo.training.loop",
    "megatron_vapo.training.run",
    "transformers.models.qwen2.modeling_qwen2",
):
    import_module(name)

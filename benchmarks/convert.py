"""Conversion of a generated checkpoint both ways: peak memory and MB/s against a plain copy of the same files.

    python -m benchmarks.convert [--gigabytes 4] [--folder DIR] [--write docs/benchmarks_convert.md]

Each conversion runs in a process of its own, whose peak resident memory is what the kernel counted (VmHWM). Page
cache is as the machine left it; conversions sync what they write to disk, and so does the copy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vapo.weights.architecture import read_architecture
from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.hf_writer import TensorSpec, write_hf_folder
from megatron_vapo.weights.placement import stacked_shapes
from megatron_vapo.weights.table import hf_shapes

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
"""Qwen2.5-1.5B's, with a head of its own and as many layers as it takes."""
SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Row:
    """One process's work."""

    name: str
    seconds: float
    peak: int
    """Bytes."""


def generate(folder: Path, gigabytes: float) -> None:
    """A checkpoint of random bfloat16 numbers in shards of 1 GiB."""
    base = folder.with_name("base")
    base.mkdir()
    one, two = (_nbytes(base, layers) for layers in (1, 2))
    layers = 1 + max(0, -(-int(gigabytes * 1e9 - one) // (two - one)))
    _nbytes(base, layers)
    shapes = hf_shapes(read_architecture(base))
    specs = [TensorSpec(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    write_hf_folder(folder, specs, _random(shapes), base, SHARD_BYTES)


def _nbytes(base: Path, layers: int) -> int:
    """Write the configuration of a model with so many layers; the size of its weights."""
    (base / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
    return sum(2 * math.prod(shape) for shape in hf_shapes(read_architecture(base)).values())


def _random(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    noise = torch.randn(2**20).bfloat16()
    for name, shape in shapes.items():
        count = math.prod(shape)
        yield name, noise.repeat(-(-count // noise.numel()))[:count].view(shape)


def largest_parameter(folder: Path) -> int:
    """Bytes of the largest tensor that a conversion has to join or cut."""
    architecture = read_architecture(folder)
    shapes = stacked_shapes(architecture).items()
    return max(2 * math.prod(shape[1:] if key.startswith("decoder.layers.") else shape) for key, shape in shapes)


def run(name: str, script: Path, *arguments: object) -> Row:
    """Run a script in a process of its own, which tells its peak at the end."""
    command = [sys.executable, "-c", _MEASURED, str(script), *map(str, arguments)]
    started = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Row(name, time.monotonic() - started, 1024 * int(output.split()[-1]))


# Not ru_maxrss, which a process inherits from the one that started it.
_MEASURED = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
_COPY = """
import os, pathlib, shutil, sys
out = pathlib.Path(sys.argv[2]); out.mkdir()
for path in pathlib.Path(sys.argv[1]).iterdir():
    copied = shutil.copyfile(path, out / path.name)
    with open(copied, "rb+") as file: os.fsync(file.fileno())
"""
_IMPORTS = """
import pathlib, sys
import megatron_vapo.observe.transfer, megatron_vapo.weights.convert
from megatron_vapo.weights.architecture import read_architecture
read_architecture(pathlib.Path(sys.argv[1]))
"""


def measure(folder: Path) -> list[Row]:
    """Copy and conversions of FOLDER/hf; each output is dropped before the next is written."""
    hf, megatron, back = folder / "hf", folder / "megatron", folder / "back"
    tools = Path(__file__).resolve().parents[1] / "tools"
    imports, copy = folder / "imports.py", folder / "copy.py"
    imports.write_text(_IMPORTS)
    copy.write_text(_COPY)
    rows = [run("imports only", imports, hf), run("plain copy", copy, hf, folder / "copy")]
    shutil.rmtree(folder / "copy")
    rows.append(run("Hugging Face -> Megatron", tools / "convert_hf_to_megatron.py", hf, megatron))
    command = [tools / "convert_megatron_to_hf.py", megatron, back, "--base", hf]
    rows.append(run("Megatron -> Hugging Face", *command))
    same = all(torch.equal(HFFolder(back).read(name), HFFolder(hf).read(name)) for name in HFFolder(hf).names)
    if not same:
        raise RuntimeError("the round trip changed tensors")
    shutil.rmtree(back)
    rows.append(run("Megatron -> Hugging Face, FP8 blocks", *command, "--fp8-blocks"))
    return rows


def table(rows: list[Row], nbytes: int, largest: int) -> str:
    """Markdown."""
    fixed = rows[0].peak
    lines = ["| | s | MB/s | peak memory, MB | above imports, in largest tensors |", "|---|---|---|---|---|"]
    for row in rows:
        rate = "" if row is rows[0] else f"{nbytes / row.seconds / 1e6:,.0f}"
        above = (row.peak - fixed) / largest
        lines.append(f"| {row.name} | {row.seconds:.1f} | {rate} | {row.peak / 1e6:,.0f} | {above:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument(
        "--folder", help="where to write (three times the size); default: the system's temporary folder"
    )
    parser.add_argument("--write", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        generate(folder / "hf", options.gigabytes)
        nbytes = sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
        shards = len(list((folder / "hf").glob("*.safetensors")))
        largest = largest_parameter(folder / "hf")
        text = table(measure(folder), nbytes, largest)
    text = f"{nbytes / 1e9:.2f} GB in {shards} shards; largest tensor {largest / 1e6:,.0f} MB (bfloat16).\n\n{text}"
    print(text)
    if options.write:
        options.write.write_text(HEADER + text + "\n", encoding="utf-8")


HEADER = """# Conversion: memory and speed

A generated checkpoint (Qwen2.5-1.5B's shapes, untied head), converted both ways by `tools/`, each in a process of its
own, against a plain copy of the same files. Peak memory is the process's largest resident set (VmHWM); the last column
takes off what the imports alone need: the claim is that it stays below 2, whatever the size of the model. The round
trip is compared bitwise. Machine: AMD EPYC, 2 cores shared with other work, 2026-11-20. Repeat it
with `python -m benchmarks.convert`.

"""

if __name__ == "__main__":
    main()

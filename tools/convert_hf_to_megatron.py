"""Hugging Face folder -> Megatron checkpoint (torch_dist) that loads under any parallel layout. No GPU is needed.

    python tools/convert_hf_to_megatron.py HF_DIR OUT [--check] [--dtype bfloat16] [--allow-pickle]

A reward model (AutoModelForSequenceClassification with one label) becomes a critic. FP8 checkpoints in blocks of
128 x 128 are read as bfloat16.
"""

import argparse
import sys

from megatron_vapo.errors import UserError
from megatron_vapo.observe.transfer import byte_progress
from megatron_vapo.runtime import cpu_backend
from megatron_vapo.weights.convert import hf_to_megatron
from megatron_vapo.weights.hf_folder import torch_dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="HF_DIR")
    parser.add_argument("out", metavar="OUT", help="folder to make; must not exist or be empty")
    parser.add_argument("--check", action="store_true", help="then run both models and print the largest difference")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the checkpoint; default: as in HF_DIR")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model*.bin, tensors only")
    options = parser.parse_args()
    with byte_progress("converting") as report:
        hf_to_megatron(
            options.source,
            options.out,
            report,
            dtype=torch_dtype(options.dtype) if options.dtype else None,
            allow_pickle=options.allow_pickle,
        )
    print(f"written: {options.out}")
    if options.check:
        cpu_backend.install()
        from megatron_vapo.commands.compare_logits import largest_difference

        difference, largest = largest_difference(options.source, options.out)
        print(f"largest logit difference {difference:.2e} (largest logit {largest:.2e})")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)

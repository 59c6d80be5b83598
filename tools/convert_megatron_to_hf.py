"""Megatron checkpoint -> Hugging Face folder with the base model's configuration, tokenizer and chat template.

    python tools/convert_megatron_to_hf.py CKPT OUT --base HF_DIR [--dtype bfloat16] [--fp8-blocks] [--check]

CKPT is what tools/convert_hf_to_megatron.py wrote, or one model of a run: RUN/checkpoints/step_000020/actor. A critic
becomes a reward model (AutoModelForSequenceClassification with one label), one with bins a classifier whose labels are
the middles of its bins. No GPU is needed.
"""

import argparse
import sys

from megatron_vapo.errors import UserError
from megatron_vapo.observe.transfer import byte_progress
from megatron_vapo.runtime import cpu_backend
from megatron_vapo.weights.convert import megatron_to_hf
from megatron_vapo.weights.hf_folder import torch_dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("out", metavar="OUT", help="folder to make; must not exist or be empty")
    parser.add_argument("--base", metavar="HF_DIR", required=True, help="the model that CKPT was trained from")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights; default: as in CKPT")
    parser.add_argument("--fp8-blocks", action="store_true", help="linear layers in FP8 (e4m3, blocks of 128 x 128)")
    parser.add_argument("--check", action="store_true", help="then run both models and print the largest difference")
    parser.add_argument(
        "--value-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="of a critic with bins: its critic.head.low and critic.head.high",
    )
    options = parser.parse_args()
    with byte_progress("converting") as report:
        megatron_to_hf(
            options.checkpoint,
            options.out,
            options.base,
            report,
            dtype=torch_dtype(options.dtype) if options.dtype else None,
            fp8_blocks=options.fp8_blocks,
            value_range=tuple(options.value_range) if options.value_range else None,
        )
    print(f"written: {options.out}")
    if options.check:
        cpu_backend.install()
        from megatron_vapo.commands.compare_logits import largest_difference

        difference, largest = largest_difference(options.out, options.checkpoint)
        print(f"largest logit difference {difference:.2e} (largest logit {largest:.2e})")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)

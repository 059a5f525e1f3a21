"""What `counterflow convert` is asked for. No torch."""

from __future__ import annotations

import argparse

DTYPES = ("bfloat16", "float32")
_CHECKPOINT = "runs/NAME, for its newest undamaged checkpoint, or the folder of one checkpoint"
_DTYPE = "of what is written; routers stay float32 (as it is stored)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's forms and their options."""
    forms = parser.add_subparsers(title="forms", required=True, metavar="FORM", dest="form")

    to_hf = forms.add_parser(
        "to-hf",
        help="a checkpoint into Hugging Face's layout",
        description="Writes a checkpoint's weights in Hugging Face's layout, one file in memory "
        "at a time. The checkpoint is verified first.",
        allow_abbrev=False,
    )
    to_hf.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINT)
    to_hf.add_argument("out", metavar="OUT", help="a folder that is new or empty")
    to_hf.add_argument("--ema", action="store_true", help="the moving average of the parameters")
    to_hf.add_argument(
        "--fp8",
        action="store_true",
        help="projections in E4M3 with a scale for each block of 128x128, as DeepSeek-V3 is "
        "published",
    )
    to_hf.add_argument(
        "--dtype",
        choices=DTYPES,
        help=f"{_DTYPE}; float32 takes the optimizer's masters where there are any",
    )
    to_hf.add_argument(
        "--max-file-gb",
        type=_positive,
        default=5.0,
        metavar="GB",
        help="size of one file, 10^9 bytes, if no tensor is larger (5)",
    )

    from_hf = forms.add_parser(
        "from-hf",
        help="a Hugging Face folder into a checkpoint that training begins with",
        description="Writes a checkpoint of parameters alone, OUT/step-00000000, that "
        "`counterflow train --checkpoint.weights OUT` begins with.",
        allow_abbrev=False,
    )
    from_hf.add_argument("folder", metavar="HF_FOLDER", help="safetensors files and config.json")
    from_hf.add_argument("out", metavar="OUT", help="a folder that is new or empty")
    from_hf.add_argument(
        "--dtype", choices=DTYPES, help=f"{_DTYPE}; what is stored in FP8 becomes float32"
    )

    info = forms.add_parser(
        "info",
        help="what a checkpoint holds, and whether it is undamaged",
        description="Tells what a checkpoint holds and verifies it; exit status 1 if it is "
        "damaged.",
        allow_abbrev=False,
    )
    info.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINT)
    info.add_argument("--json", action="store_true", help="print one JSON object")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value

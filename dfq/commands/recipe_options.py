"""How a model is quantized."""

from __future__ import annotations

import argparse


def add_recipe_options(parser: argparse.ArgumentParser, bits: str) -> None:
    group = parser.add_argument_group("quantization")
    group.add_argument(
        "--bits",
        default=bits,
        metavar="wXaY",
        help="bits of weights, 2 to 8, and activations, 2 to 8 or 16 (default: %(default)s)",
    )
    group.add_argument(
        "--recipe",
        default="fast",
        metavar="NAME|FILE.toml",
        help="how; see `dfq list recipes`; NAME-g64 has weights in groups of 64 (default: %(default)s)",
    )

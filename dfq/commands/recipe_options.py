"""How a model is quantized."""

from __future__ import annotations

import argparse


def add_recipe_options(parser: argparse.ArgumentParser, bits: str) -> None:
    parser.add_argument("--bits", default=bits, metavar="wXaY", help="bits of weights and activations (%(default)s)")
    parser.add_argument(
        "--recipe", default="fast", metavar="NAME|FILE.toml", help="how; see `dfq list recipes` (%(default)s)"
    )

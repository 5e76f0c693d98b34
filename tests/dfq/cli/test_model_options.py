"""Options that name a model."""

from __future__ import annotations

from dfq.cli import build_parser
from dfq.commands.model_options import model_words


def words(*given: str) -> list[str]:
    return model_words(build_parser().parse_args(["sensitivity", *given, "--bits", "w4a8"]))


def test_a_command_that_goes_on_names_the_same_model() -> None:
    given = ["vit_tiny_patch16_224", "--checkpoint", "pets.safetensors", "--image-size", "96"]
    given += ["--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225", "--crop-pct", "1.0"]
    assert words(*given) == given
    assert words("reference", "--seed", "3") == ["reference"]
    # Of weights that are drawn the seed says which.
    assert words("vit_tiny_patch16_224", "--random-weights", "--seed", "3") == [
        "vit_tiny_patch16_224", "--random-weights", "--seed", "3"
    ]  # fmt: skip

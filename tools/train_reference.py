"""Trains the reference model that dfq carries and writes its weights.

    python tools/train_reference.py [--out weights.safetensors]

Takes a few minutes on one CPU core and gives the same file, bit for bit, whenever it is run on one machine: the seed
and the number of threads are fixed. The weights of the last epoch are kept; no epoch is chosen by the held-out images.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dfq import reference

SEED = 0
THREADS = 1
"""A second one gains nothing on batches so small, and the order of sums would hang on it."""
EPOCHS = 50
BATCH_SIZE = 16
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
WARMUP = 0.1
"""Share of the steps in which the learning rate rises to its peak."""
MAX_DEGREES = 10.0
MAX_SCALING = 0.1
MAX_SHEAR = 0.2
MAX_SHIFT = 2.0
"""In pixels."""


def normalise(images: Tensor) -> Tensor:
    """images: `[B, 3, H, W]` in [0, 1]. The same in the model's normalised space."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (reference.MEAN, reference.STD))
    return (images - mean) / std


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """images: `[B, 3, H, W]` in [0, 1]. Each turned, sheared, scaled and shifted a little.

    Small enough that no digit becomes another one; what comes in at the edges is black, as the background.
    """

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, scale, shear = torch.deg2rad(uniform(MAX_DEGREES)), 1 + uniform(MAX_SCALING), uniform(MAX_SHEAR)
    # affine_grid counts an image as 2 units wide and high.
    shift_x, shift_y = (uniform(MAX_SHIFT) * 2 / size for size in reversed(reference.IMAGE_SIZE))
    cos, sin = angle.cos() * scale, angle.sin() * scale
    affine = torch.stack([torch.stack([cos, shear - sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)], 1)
    grid = nn.functional.affine_grid(affine, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def train() -> nn.Module:
    """The reference model, trained on the training digits."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = reference.build()
    pixels, labels = reference.digits("train")
    images = pixels.float() / 255

    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
    )
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=WARMUP, cycle_momentum=False
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)

    model.train()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        batches = order[: len(order) // BATCH_SIZE * BATCH_SIZE].view(-1, BATCH_SIZE)
        for batch in batches:
            optimizer.zero_grad()
            loss = loss_of(model(normalise(jitter(images[batch], generator))), labels[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}/{EPOCHS}  training loss {total / len(batches):.3f}", flush=True)
    trained: nn.Module = model.eval()
    return trained


def accuracy(weights: Path) -> float:
    """Percent of the held-out digits that the model with the weights of this file gets right."""
    model = reference.build().eval()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    images, labels = reference.digits("test")
    with torch.inference_mode():
        right = model(normalise(images.float() / 255)).argmax(1) == labels
    return 100 * float(right.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=reference.weights_path(), help="file to write (default: the packaged one)"
    )
    out: Path = parser.parse_args().out

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()
    model = train()
    seconds = time.perf_counter() - start

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    # Not save_file: that makes a file only its owner may read.
    partial.write_bytes(save({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}))
    partial.replace(out)
    print(f"held-out accuracy  {accuracy(out):.2f} % of {len(reference.digits('test')[1])} images")
    print(f"trained in         {seconds:.0f} s")
    print(f"file               {out}, {out.stat().st_size} bytes")
    print(f"sha256             {hashlib.sha256(out.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()

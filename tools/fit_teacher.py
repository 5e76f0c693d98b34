"""Fits a classifier for new classes on a backbone that stays as it is: a real teacher for knowledge transfer.

    python tools/fit_teacher.py vit_tiny_patch16_224 --checkpoint vit_tiny.safetensors --crop-pct 1 \
        --train-dir cifar10/train --test-dir cifar10/test --out teacher.safetensors

Multinomial logistic regression on the features that enter the classifier, images as the backbone takes them
(`--crop-pct 1`: resized, nothing cut off). The penalty is chosen by accuracy in cross-validation on the training
images; the test images are only measured. Minutes on two CPU cores for a tiny ViT and 3,000 images.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from sklearn.linear_model import LogisticRegressionCV
from torch import Tensor
from torch.utils.data import DataLoader

import dfq
from dfq.datasets import image_folder

PENALTIES = [1e-3, 1e-2, 1e-1, 1.0, 10.0]
"""Inverse strengths that are tried; features are standardised, so the unit is one standard deviation."""
FOLDS = 5


def features(model: dfq.Model, folder: Path) -> tuple[Tensor, Tensor]:
    """What enters the classifier, [M, D], and the labels, [M]."""
    module: Any = model.module
    found, labels = [], []
    with torch.inference_mode():
        for images, numbers in DataLoader(image_folder(folder, model), batch_size=64):
            found.append(module.forward_head(module.forward_features(images), pre_logits=True))
            labels.append(numbers)
    return torch.cat(found), torch.cat(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a timm name whose classifier is one linear layer called head")
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights of the backbone")
    parser.add_argument("--crop-pct", type=float, help="share of the resized image in the crop (the model's own)")
    parser.add_argument("--train-dir", type=Path, required=True, help="one folder of images per class")
    parser.add_argument("--test-dir", type=Path, required=True, help="the same classes")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    arguments = parser.parse_args()

    model = dfq.load_model(arguments.model, checkpoint=arguments.checkpoint, crop_pct=arguments.crop_pct, device="cpu")
    classes = sorted(entry.name for entry in arguments.train_dir.iterdir() if entry.is_dir())
    model.module.reset_classifier(len(classes))  # type: ignore[operator]
    inputs, labels = features(model, arguments.train_dir)
    mean, std = inputs.mean(0), inputs.std(0)
    standardised = ((inputs - mean) / std).double().numpy()
    fit = LogisticRegressionCV(
        Cs=PENALTIES,
        cv=FOLDS,
        scoring="accuracy",
        max_iter=1000,
        l1_ratios=(0,),
        use_legacy_attributes=False,
    )
    fit.fit(standardised, labels.numpy())

    weight = torch.from_numpy(fit.coef_).float() / std
    bias = torch.from_numpy(fit.intercept_).float() - weight @ mean
    state = model.module.state_dict() | {"head.weight": weight, "head.bias": bias}
    model.module.load_state_dict(state)
    arguments.out.write_bytes(save({name: tensor.contiguous() for name, tensor in state.items()}, {"format": "pt"}))
    print(f"{len(labels)} images of {len(classes)} classes; inverse penalty {fit.C_}")
    print(dfq.evaluate(model, arguments.test_dir).table())
    print(f"kept in {arguments.out}")


if __name__ == "__main__":
    main()

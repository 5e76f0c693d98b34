"""What Adam moves: the pixels themselves, or the waves they are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibration.initial import COLOUR


class Pixels:
    """Pixels that are moved one by one, and clamped to what an image can hold.

    initial: [B, 3, H, W], normalised; low, high: the normalised values of black and white, per channel.
    """

    def __init__(self, initial: Tensor, low: Tensor, high: Tensor) -> None:
        # Fused Adam on a CPU takes pixels and gradient for laid out alike, and does not look.
        self.parameter = initial.clone(memory_format=torch.contiguous_format)
        self._low, self._high = low, high

    @property
    def images(self) -> Tensor:
        """[B, 3, H, W], normalised, as they are now."""
        return self.parameter

    def pull(self, gradient: Tensor) -> None:
        """Give the parameter the gradient that the images have."""
        self.parameter.grad = gradient.contiguous()

    def moved(self) -> None:
        """The parameter has been moved: bring the images after it."""
        self.parameter.clamp_(self._low, self._high)


class Waves:
    """Images as sums of waves, in logits and in colours that photographs have apart, each wave moved as one.

    Adam moves all of its numbers equally far. Pixel by pixel that makes noise, which one network takes for a class and
    no other does; wave by wave, with steps that fall with the frequency as amplitudes do in photographs, it makes
    shapes (Olah, Mordvintsev and Schubert, Feature Visualization, Distill 2017, "preconditioning").

    Each image keeps the mean and the contrast, of its logits, that it begins with: left alone they grow until all is
    black or white, which tells a network more than photographs do.

    power: of the frequency, that steps fall with; 1 for equal steps in every octave.
    """

    def __init__(self, initial: Tensor, low: Tensor, high: Tensor, power: float) -> None:
        self._low, self._range = low, high - low
        height, width = self._size = initial.shape[-2:]
        device = initial.device
        down = torch.fft.fftfreq(height, 1 / height, device=device)[:, None]
        right = torch.fft.rfftfreq(width, 1 / width, device=device)
        # Cycles per image; the mean of the image moves as the longest wave does.
        frequency = torch.hypot(down * math.sqrt(width / height), right * math.sqrt(height / width)).clamp_min(1.0)
        self._steps = frequency.pow(-power).to(initial.dtype)
        self._colour = COLOUR.to(initial)
        levels = ((initial - low) / self._range).clamp(_FLOOR, 1 - _FLOOR).logit()
        self._mean, self._std = _exposure(levels)
        independent = torch.einsum("cd,bdhw->bchw", self._colour.inverse(), levels)
        waves = torch.fft.rfft2(independent, norm="forward") / self._steps
        self.parameter = torch.view_as_real(waves).contiguous()
        self.moved()

    @property
    def images(self) -> Tensor:
        """[B, 3, H, W], normalised, as they are now."""
        return self._images

    def pull(self, gradient: Tensor) -> None:
        """Give the parameter the gradient that the images have."""
        with torch.enable_grad():
            leaf = self.parameter.detach().requires_grad_()
            self.parameter.grad = torch.autograd.grad(self._drawn(leaf), leaf, gradient)[0]

    def moved(self) -> None:
        """The parameter has been moved: bring the images after it."""
        with torch.no_grad():
            self._images = self._drawn(self.parameter)

    def _drawn(self, parameter: Tensor) -> Tensor:
        waves = torch.view_as_complex(parameter) * self._steps
        independent = torch.fft.irfft2(waves, s=self._size, norm="forward")
        levels = torch.einsum("cd,bdhw->bchw", self._colour, independent)
        mean, std = _exposure(levels)
        levels = self._mean + self._std * (levels - mean) / std
        return self._low + self._range * levels.sigmoid()


def _exposure(levels: Tensor) -> tuple[Tensor, Tensor]:
    """levels: [B, 3, H, W] -> mean and standard deviation of each image, [B, 1, 1, 1]."""
    axes = (-3, -2, -1)
    return levels.mean(axes, keepdim=True), levels.std(axes, keepdim=True).clamp_min(_FLOOR)


Canvas = Pixels | Waves

_FLOOR = 1 / 512
"""Half of a step between two shades: what is black or white to the last bit has a finite logit."""

"""What of a student is trained, and how: one step, or all at once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from calibration.team import ALONE, team
from dfq.errors import DfqError, UsageError
from dfq.evaluation import evaluate
from dfq.models import Model
from dfq.ptq.engine import QuantizedModel
from dfq.ptq.tuning import Tuned, tunable
from dfq.recipe import Reconstruction
from dfq.statistics import divergence
from dfq.transfer.pool import Pool, View
from dfq.transfer.ridge import Level, classifier_of, ends_in_layer_norm
from dfq.transfer.student import classifiers_of

Optimizer = Literal["ridge", "sgd", "adamw"]
Decay = Literal["cosine", "constant"]

_LAST = re.compile(r"last-([1-9][0-9]*)")


@dataclass(frozen=True)
class Training:
    """How a student is trained.

    part: `linear`, the classifier alone (SMI, section 4.3); `last-K`, also the last K layers below it, as timm groups
    them: blocks, in a ViT; `full`, everything. windows: of each image, at random, that are shown besides it, of a
    quarter of its area or more, mirrored, at a lower resolution, each with what the teacher makes of it.

    optimizer: `ridge`, for a classifier that is one linear layer and trained alone: the least squares between the
    logits of both, to which the divergence comes at a high temperature (Hinton et al., 2015, section 2.1), in closed
    form, see `classifier_of`; None: that, or `sgd` where that cannot be, or `adamw` for a quantized student.
    shrinkage: of `ridge`, what is added to the second moment of the features, as a share of its mean diagonal; level:
    of `ridge`, where all classes are to be equally likely, see `classifier_of`; None: at the origin of features that a
    LayerNorm gives, at the mean of the pool for others.

    Of the others, steps: per round; batch_size: pictures per step; temperature: of both distributions in the
    Kullback-Leibler divergence, which is multiplied by its square (Hinton et al., 2015); learning_rate: at the start,
    None for one that suits the rest; decay: of the rate over the whole run.

    Raises UsageError for what cannot be meant.
    """

    part: str = "linear"
    steps: int = 100
    batch_size: int = 128
    windows: int = 9
    temperature: float = 20.0
    optimizer: Optimizer | None = None
    shrinkage: float = 0.3
    level: Level | None = None
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay: Decay = "cosine"

    def __post_init__(self) -> None:
        if self.part not in ("linear", "full") and not _LAST.fullmatch(self.part):
            raise UsageError(f"cannot train {self.part!r} of a student: choose linear, full or last-K (last-2)")
        for name, known in (("optimizer", get_args(Optimizer)), ("decay", get_args(Decay)), ("level", get_args(Level))):
            if getattr(self, name) not in (*known, *[None] * (name != "decay")):
                raise UsageError(f"unknown {name} {getattr(self, name)!r}: choose from {', '.join(known)}")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.windows < 0:
            raise UsageError(f"the number of windows must be 0 or more, not {self.windows}")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"the temperature must be a positive number, not {self.temperature}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise UsageError(f"the learning rate must be a positive number, not {self.learning_rate}")
        if self.optimizer == "ridge" and self.part != "linear":
            raise UsageError(f"ridge is for a classifier that is trained alone, not for {self.part}")
        if not 0 <= self.shrinkage < math.inf:
            raise UsageError(f"the shrinkage must be 0 or more, not {self.shrinkage}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"the momentum must be at least 0 and below 1, not {self.momentum}")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"the weight decay must be 0 or more, not {self.weight_decay}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def settled(self, student: Model | QuantizedModel) -> Training:
        """The same with everything chosen that hangs on the student."""
        if isinstance(student, QuantizedModel):
            return replace(self, optimizer=self.optimizer or "adamw")
        whole = self.part == "linear" and _linear_classifier(student.module) is not None
        level: Level = "origin" if ends_in_layer_norm(student.module) else "pool"
        return replace(self, optimizer=self.optimizer or ("ridge" if whole else "sgd"), level=self.level or level)

    def share(self, step: int, steps: int) -> float:
        """Of the learning rate that is left at `step` of `steps`."""
        return 1.0 if self.decay == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))


def check_part(student: Model | QuantizedModel, training: Training) -> None:
    """Raise DfqError where the student cannot be trained like that."""
    if isinstance(student, Model):
        _chosen(student, training.part)
        if training.optimizer == "ridge" and _linear_classifier(student.module) is None:
            raise UsageError(
                f"the classifier of {student.name} is more than one linear layer: train it by sgd or adamw"
            )
    elif training.part != "full":
        raise DfqError(f"a quantized student is trained in full, not {training.part}: give --train full")
    elif training.optimizer != "adamw":
        raise DfqError("a quantized student is trained by adamw: its parameters have units of their own")


class Trainee:
    """A student while it is trained.

    groups: of parameters, each with its learning rate; kept: by name, all tensors that training changes. tuned: what is
    open of a quantized student. classifier: where it alone is trained and is one linear layer; what enters it never
    changes, and is computed once per image.
    """

    def __init__(
        self,
        view: View,
        groups: list[tuple[list[nn.Parameter], float]],
        kept: dict[str, Tensor],
        tuned: Tuned | None = None,
        classifier: nn.Linear | None = None,
    ) -> None:
        self.view, self.groups, self.kept = view, groups, kept
        self._tuned, self._classifier = tuned, classifier
        self._features = torch.empty(0, 0 if classifier is None else classifier.in_features)
        self._seen: tuple[Tensor, Tensor] | None = None

    def apply(self) -> None:
        """Give a quantized student the weights as they are now."""
        if self._tuned is not None:
            self._tuned.apply()

    def top1(self, data: Dataset[Any]) -> float:
        """Percent of labelled images that the student gets right, as `evaluate` has it; of one `data` per trainee.

        What enters a classifier that alone is trained is computed the first time, and not again.
        """
        if self._seen is not None and self._classifier is not None:
            features, labels = self._seen
            with torch.no_grad():
                right = self._classifier(features.to(self.view.network.device)).argmax(1).cpu() == labels
            counts = team().gather((int(right.sum()), len(right)))
            return 100 * sum(hits for hits, _ in counts) / sum(count for _, count in counts)
        noted = data if isinstance(data, IterableDataset) else _Noted(data)
        entering: list[Tensor] = []
        module = self.view.network.module
        training = module.training
        module.eval()
        try:
            with _inputs_of(self._classifier, entering):
                found = evaluate(self.view.network, noted, progress=False).top1  # type: ignore[arg-type]
        finally:
            module.train(training)
        if self._classifier is not None and isinstance(noted, _Noted):
            nothing = torch.empty(0, self._classifier.in_features)
            self._seen = torch.cat([nothing, *entering]), torch.tensor(noted.labels, dtype=torch.int64)
        return found

    def logits(self, pool: Pool, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(numbers of some of the chosen pictures, the student's logits for them), until all have been given."""
        if self._classifier is not None:
            self._look_at_what_is_new(pool, self._classifier)
            yield chosen, self._classifier(self._features[chosen].to(self.view.network.device))
            return
        for some, images, mask in pool.batches(chosen):
            yield some, self.view(images, mask)

    def solve(self, pool: Pool, chosen: Tensor, shrinkage: float, level: Level) -> None:
        """Give a classifier that alone is trained what `classifier_of` finds on the chosen pictures."""
        classifier = self._classifier
        if classifier is None:
            raise RuntimeError("only one linear classifier that is trained alone has a closed form")
        self._look_at_what_is_new(pool, classifier)
        weight, bias = classifier_of(self._features[chosen], pool.logits[chosen], shrinkage, level)
        classifier.weight.copy_(weight)
        if classifier.bias is not None:
            classifier.bias.copy_(bias)

    @property
    def shares_steps(self) -> bool:
        """Whether a team divides the pictures of a step; a classifier alone is quicker than a message."""
        return self._classifier is None

    def agree(self) -> None:
        """After steps that a team shared: what each has seen of its own, running means, is the leader's in all."""
        own = {id(parameter) for parameters, _ in self.groups for parameter in parameters}
        team().follow([tensor for tensor in self.kept.values() if id(tensor) not in own])

    def _look_at_what_is_new(self, pool: Pool, classifier: nn.Linear) -> None:
        known = len(self._features)
        if known == len(pool):
            return
        new = torch.zeros(len(pool) - known, classifier.in_features)
        self._features = torch.cat([self._features, new])
        entering: list[Tensor] = []

        def look(images: Tensor, mask: Tensor) -> Tensor:
            self.view(images, mask)
            return entering.pop()

        used = torch.cat([pool.trained_on, pool.held_out])
        with _inputs_of(classifier, entering), torch.no_grad():
            pool.fill(self._features, used[used >= known], look)


class _Noted(Dataset[Any]):
    """A dataset that keeps the labels it gives, in order."""

    def __init__(self, data: Dataset[Any]) -> None:
        self._data, self.labels = data, list[int]()

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]  # torch declares no length, but every map-style dataset has one

    def __getitem__(self, index: int) -> Any:
        image, label = self._data[index]
        self.labels.append(int(label))
        return image, label


@contextmanager
def _inputs_of(classifier: nn.Linear | None, kept: list[Tensor]) -> Iterator[None]:
    """While it is open, what enters the classifier is kept, on the CPU and in float32."""
    if classifier is None:
        yield
        return
    handle = classifier.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].float().flatten(1).cpu()))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def trained(view: View, training: Training) -> Iterator[Trainee]:
    """Open the student that `view` shows; on leaving, it is as it was found, but for what it has learned.

    A quantized one has its weights, scales, biases and norms tuned straight through the roundings (STE and LSQ), in the
    proportions of `Reconstruction`. Raises DfqError as `check_part` does.
    """
    network = view.network
    assert isinstance(network, Model | QuantizedModel)
    check_part(network, training)
    if isinstance(network, QuantizedModel):
        with _quantized(network, view, training) as trainee:
            yield trainee
        return
    module = network.module
    names = _chosen(network, training.part)
    parameters = dict(module.named_parameters())
    modes = [(part, part.training) for part in module.modules()]
    # What is frozen stays as it is used: norms over a batch with their own statistics, no dropout.
    module.train(training.part == "full")
    rate = training.learning_rate or _RATES[training.optimizer, training.part == "linear"]
    try:
        for name in names:
            parameters[name].requires_grad_(True)
        yield Trainee(
            view,
            [([parameters[name] for name in names], rate)],
            {name: parameters[name] for name in names} | dict(module.named_buffers()),
            classifier=_linear_classifier(module) if training.part == "linear" else None,
        )
    finally:
        for part, mode in modes:
            part.training = mode
        module.requires_grad_(False)


# By optimizer, and whether the classifier alone is trained.
_RATES: dict[tuple[Optimizer | None, bool], float] = {
    ("ridge", True): 0.0,
    ("sgd", True): 0.003,
    ("sgd", False): 0.01,
    ("adamw", True): 1e-3,
    ("adamw", False): 1e-4,
}


@contextmanager
def _quantized(network: QuantizedModel, view: View, training: Training) -> Iterator[Trainee]:
    settings = Reconstruction()
    factor = 1.0 if training.learning_rate is None else training.learning_rate / settings.weight_rate
    with tunable(network.module, {}) as tuned:
        weights = [weight.parameter for _, weight in tuned.layers]
        groups = [
            (weights, settings.weight_rate * factor),
            (tuned.scales, settings.scale_rate * factor),
            (tuned.others, settings.bias_rate * factor),
        ]
        kept = {f"{group}.{index}": p for group, (of, _) in enumerate(groups) for index, p in enumerate(of)}
        yield Trainee(view, groups, dict(kept), tuned=tuned)


def _linear_classifier(module: Any) -> nn.Linear | None:
    """The classifier, where it is one linear layer."""
    classifier = module.get_classifier()
    return classifier if type(classifier) is nn.Linear else None


def _chosen(network: Model, part: str) -> list[str]:
    """Names of the parameters that are trained."""
    module: Any = network.module
    everything = [name for name, _ in module.named_parameters()]
    if part == "full":
        return everything
    if part == "linear":
        own = {id(parameter) for head in classifiers_of(module) for parameter in head.parameters()}
        return [name for name, parameter in module.named_parameters() if id(parameter) in own]
    match = _LAST.fullmatch(part)
    assert match is not None
    groups = list(group_parameters(module, module.group_matcher(coarse=False)).values())
    # The last group is the classifier, the first the stem.
    between = len(groups) - 2
    if int(match[1]) > between:
        raise UsageError(f"{network.name} has {between} layers between stem and classifier; {part} asks for more")
    wanted = {name for group in groups[-1 - int(match[1]) :] for name in group}
    return [name for name in everything if name in wanted]


def optimizer_of(trainee: Trainee, training: Training) -> torch.optim.Optimizer:
    """Over the groups of a trainee, at their full rates; with `ridge` it takes no step."""
    groups = [{"params": parameters, "lr": rate} for parameters, rate in trainee.groups if parameters]
    if training.optimizer in ("sgd", "ridge"):
        return torch.optim.SGD(groups, momentum=training.momentum, weight_decay=training.weight_decay)
    decay = 0.0 if isinstance(trainee.view.network, QuantizedModel) else training.weight_decay
    return torch.optim.AdamW(groups, weight_decay=decay)


@torch.no_grad()
def solve(trainee: Trainee, pool: Pool, training: Training) -> float:
    """Replace the classifier by the one of least squares on the pool; gives the mean divergence of the centred logits.

    Centred, over the pictures, as the regression has them.
    """
    chosen = pool.trained_on
    assert training.level is not None
    trainee.solve(pool, chosen, training.shrinkage, training.level)
    ((_, found),) = trainee.logits(pool, chosen)
    wanted = pool.logits[chosen].to(found.device)
    return float(divergence(found - found.mean(0), wanted - wanted.mean(0), training.temperature).mean())


def step(trainee: Trainee, optimizer: torch.optim.Optimizer, pool: Pool, chosen: Tensor, temperature: float) -> float:
    """One step on the chosen pictures of the pool, shared by the team; gives the mean divergence before it."""
    trainee.apply()
    optimizer.zero_grad()
    shared = team() if trainee.shares_steps else ALONE
    # Pictures of one size after the other, and one step back: what all share, weights straight through their rounding,
    # is gone back through once.
    losses = [
        divergence(logits, pool.logits[some].to(logits.device), temperature).sum()
        for some, logits in trainee.logits(pool, chosen[shared.rank :: shared.size])
    ]
    total = 0.0
    if losses:
        loss = torch.stack(losses).sum() / len(chosen)
        loss.backward()  # type: ignore[no-untyped-call]
        total = float(loss.detach())
    if shared.size > 1:
        parameters = [parameter for parameters, _ in trainee.groups for parameter in parameters]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        shared.add([parameter.grad for parameter in parameters if parameter.grad is not None])
        total = sum(shared.gather(total))
    optimizer.step()
    return total

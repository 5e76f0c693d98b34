"""The loop of a transfer: images join the pool, the student is trained on it, and measured."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.data import Dataset

from calibration import CalibrationSet
from calibration.making import batch_generator
from calibration.passes import resolve_precision
from calibration.team import team
from dfq.errors import DfqError
from dfq.evaluation import evaluate
from dfq.models import Model
from dfq.ptq.engine import QuantizedModel
from dfq.transfer.pool import Pool, View
from dfq.transfer.record import Round, StateFile
from dfq.transfer.training import Trainee, Training, optimizer_of, solve, step, trained

log = logging.getLogger("dfq")

HELD_OUT_EVERY = 10
"""Of so many images of the pool one is held out where there are no labelled images to measure on."""


class Teaching:
    """The loop."""

    def __init__(
        self,
        teacher: Model,
        student: Model | QuantizedModel,
        training: Training,
        rounds: int,
        seed: int,
        data: tuple[Dataset[Any], Dataset[Any]] | None,
    ) -> None:
        self._teacher, self._student, self._training = teacher, student, training
        self._rounds, self._seed, self._data = rounds, seed, data

    def run(self, parts: Iterator[list[CalibrationSet]], state: StateFile | None) -> tuple[list[Round], float | None]:
        """(what each round came to, the teacher's top-1 where there are labelled images)."""
        started = time.monotonic()
        made = next(parts)
        generating = time.monotonic() - started
        done: list[Round] = []
        with ExitStack() as stack:
            dtype = resolve_precision("auto", self._teacher.device)
            views = [View(network, dtype) for network in (self._teacher, self._student)]
            trainee = stack.enter_context(trained(views[1], self._training))
            optimizer = optimizer_of(trainee, self._training)
            pool = Pool(views[0], 0 if self._data is not None else HELD_OUT_EVERY, self._training.windows)
            if state is not None:
                done = state.take_up(trainee, optimizer)
                if done:
                    log.info("going on after round %d of %d", len(done), self._rounds)
            for number in range(1, self._rounds + 1):
                started = time.monotonic()
                if number > 1:
                    made = next(parts, [])
                    generating = time.monotonic() - started
                started = time.monotonic()
                for part in made:
                    pool.add(part)
                if number <= len(done):
                    continue
                divergence = self._train(trainee, optimizer, pool, number)
                seconds = time.monotonic() - started
                if not math.isfinite(divergence):
                    raise DfqError("the student left the finite numbers: give a lower learning rate")
                entry = Round(
                    number,
                    pool.num_images,
                    divergence,
                    self._agreement(trainee, pool),
                    self._top1(trainee, number),
                    generating if made else 0.0,
                    seconds,
                )
                done.append(entry)
                log.info("%s", _line(entry, self._rounds))
                if state is not None and team().leads:
                    state.keep(trainee, optimizer, done)
            # What is left of the plan finishes the set on disk.
            for _ in parts:
                pass
        teacher_top1 = None
        if self._data is not None:
            teacher_top1 = evaluate(self._teacher, self._data[0], progress=False).top1
        return done, teacher_top1

    def _train(self, trainee: Trainee, optimizer: torch.optim.Optimizer, pool: Pool, number: int) -> float:
        training = self._training
        if training.optimizer == "ridge":
            return solve(trainee, pool, training)
        # Of the round's own, so that a run that was stopped draws what it would have drawn.
        generator = batch_generator(self._seed, number)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        candidates = pool.trained_on
        total = 0.0
        for index in range(training.steps):
            share = training.share((number - 1) * training.steps + index, self._rounds * training.steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            places = torch.randperm(len(candidates), generator=generator)[: training.batch_size]
            total += step(trainee, optimizer, pool, candidates[places], training.temperature)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        trainee.apply()
        trainee.agree()
        return total / training.steps

    def _agreement(self, trainee: Trainee, pool: Pool) -> float | None:
        held_out = pool.held_out
        if not len(held_out):
            return None
        same = 0
        with torch.no_grad():
            for some, logits in trainee.logits(pool, held_out):
                same += int((logits.argmax(1).cpu() == pool.logits[some].argmax(1)).sum())
        return 100 * same / len(held_out)

    def _top1(self, trainee: Trainee, number: int) -> float | None:
        every = -(-self._rounds // 10)
        if self._data is None or (number % every and number != self._rounds):
            return None
        return trainee.top1(self._data[1])


def _line(entry: Round, rounds: int) -> str:
    parts = [f"round {entry.round}/{rounds}", f"{entry.images} images", f"divergence {entry.divergence:.3g}"]
    if entry.agreement is not None:
        parts.append(f"agreement {entry.agreement:.1f} %")
    if entry.top1 is not None:
        parts.append(f"top-1 {entry.top1:.2f} %")
    return ", ".join(parts)

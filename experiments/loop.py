"""The loop that experiments share: epochs of steps, evaluation, checkpoints, and how it ends."""

import contextlib
import dataclasses
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import run_folder
from capsjax import sharding
from capsjax.checkpoint import Checkpoints
from capsjax.data import Dataset
from capsjax.train import Metrics, Recipe, Report, TrainState, jit_steps

# Steps in flight: enough to keep a GPU busy while the host reads results; on a mesh of CPU devices
# more than about 16 steps that nobody waits for abort the process.
_IN_FLIGHT = 4


class Diverged(ArithmeticError):
    """A loss or a gradient stopped being a finite number."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is fixed before the first step."""

    recipe: Recipe
    schedule: Callable[[int], Any]  # step -> learning rate
    mesh: jax.sharding.Mesh
    dataset: Dataset
    train_indices: np.ndarray  # int32, into x_train
    validation_indices: np.ndarray
    batch_size: int
    epochs: int
    seed: int
    checkpoint_steps: int

    @property
    def steps(self) -> int:
        """Steps an epoch; a last, smaller batch is dropped."""
        return len(self.train_indices) // self.batch_size


class Evaluation(NamedTuple):
    """Figures of one network on one set of images."""

    margin: float
    reconstruction: float
    wrong: int
    examples: int
    classes: np.ndarray  # int32 [examples]: what each image was taken for

    @property
    def error(self) -> float:
        """Percent."""
        return 100 * self.wrong / self.examples


class Runner:
    """A plan on its devices."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._train, self._evaluate = jit_steps(plan.recipe, plan.mesh)
        data = plan.dataset
        self._train_set = self._place(data.x_train, data.y_train)
        self._test_set = self._place(data.x_test, data.y_test)
        self._key = jax.random.key(plan.seed)

    def train(
        self, folder: Path, state: TrainState, notes: dict[str, Any], checkpoints: Checkpoints
    ) -> tuple[TrainState, Evaluation | None]:
        """Trains from `state` to the last epoch.

        Returns the last state, and its evaluation on the test images if an epoch was left to do.

        Raises:
          Diverged: at the first step with a loss or gradient that is not finite.
          SystemExit: after SIGINT or SIGTERM and the checkpoint that follows it, status 128 + n.
        """
        plan, test = self.plan, None
        state = jax.device_put(state, sharding.replicated(plan.mesh))
        done = int(state.step) // plan.steps
        rows: list[dict[str, Any]] = [*run_folder.read_rows(folder)[:done]]
        seconds = notes.get("seconds", 0.0)
        with stop_signals() as stopped:
            for epoch in range(done, plan.epochs):
                state, seconds = self._epoch(epoch, state, seconds, checkpoints, stopped)
                held_out = plan.validation_indices
                validation = self.evaluate(state.params, held_out) if len(held_out) else None
                test = self.evaluate(state.params)
                rows.append(self._row(epoch, state, validation, test, seconds))
                # The row before its checkpoint: a run killed between them does the epoch's rest
                # again and writes its row again; the other way round the row would be lost.
                run_folder.write_rows(folder, rows)
                state, seconds = state._replace(sums=Metrics.zeros()), 0.0
                error = validation.error / 100 if validation else None
                checkpoints.save(state, {"seconds": seconds}, error)
                tqdm.write(_summary(rows[-1], plan.epochs))
        return state, test

    def evaluate(self, params: Any, train_indices: np.ndarray | None = None) -> Evaluation:
        """Evaluates on the test images, or on some of the training images."""
        images, labels = self._test_set if train_indices is None else self._train_set
        indices = np.arange(len(labels), dtype=np.int32) if train_indices is None else train_indices
        size = self.plan.batch_size
        filled = -len(indices) % size  # the last batch is filled up with images that do not count
        batches = np.pad(indices, (0, filled)).reshape(-1, size)
        counts = (np.arange(batches.size) < len(indices)).reshape(batches.shape)
        results = []
        for batch, counted in zip(batches, counts, strict=True):
            results.append(self._evaluate(params, images, labels, batch, counted))
            if len(results) > _IN_FLIGHT:
                jax.block_until_ready(results[-1 - _IN_FLIGHT])
        metrics, classes = zip(*jax.device_get(results), strict=True)
        sums = Metrics(*(sum(values) for values in zip(*metrics, strict=True)))
        n = int(sums.examples)
        return Evaluation(
            margin=float(sums.margin) / n,
            reconstruction=float(sums.reconstruction) / n,
            wrong=n - int(sums.correct),
            examples=n,
            classes=np.concatenate(classes)[: len(indices)],
        )

    def _epoch(self, epoch, state, seconds, checkpoints, stopped) -> tuple[TrainState, float]:
        """Does the steps that are left of an epoch; the epoch's seconds so far come and go."""
        plan = self.plan
        first = int(state.step) - epoch * plan.steps
        batches = epoch_order(plan, epoch)[first:]
        in_flight: deque[Report] = deque()
        bar = tqdm(
            desc=f"epoch {epoch + 1}/{plan.epochs}",
            total=plan.steps * plan.batch_size,
            initial=first * plan.batch_size,
            unit=" images",
            leave=False,
            disable=None,
        )
        start = time.perf_counter() - seconds
        with bar:
            for number, batch in enumerate(batches, first + 1):
                state, report = self._train(state, self._key, *self._train_set, batch)
                in_flight.append(report)
                due = number % plan.checkpoint_steps == 0 or stopped or number == plan.steps
                while len(in_flight) > (0 if due else _IN_FLIGHT):
                    self._read(in_flight.popleft(), bar)
                seconds = time.perf_counter() - start
                if stopped or (due and number < plan.steps):
                    checkpoints.save(state, {"seconds": seconds})
                if stopped:
                    checkpoints.wait()
                    raise SystemExit(128 + stopped[0])
        return state, seconds

    def _read(self, report: Report, bar: tqdm) -> None:
        """Shows a step's figures, or stops the run over them."""
        report = jax.device_get(report)
        n = self.plan.batch_size
        margin, reconstruction = (float(value) / n for value in report.metrics[:2])
        for quantity, value in (
            ("margin loss", margin),
            ("reconstruction loss", reconstruction),
            ("gradient", float(report.gradient)),
        ):
            if not math.isfinite(value):
                raise Diverged(f"step {report.step}: the {quantity} is {value}")
        bar.set_postfix(
            loss=f"{margin + self.plan.recipe.lam_recon * reconstruction:.4f}",
            accuracy=f"{100 * int(report.metrics.correct) / n:.1f} %",
            refresh=False,
        )
        bar.update(n)

    def _row(self, epoch, state, validation, test, seconds) -> dict[str, Any]:
        """The epoch's row of metrics.csv: errors in percent, losses as means over examples."""
        plan = self.plan
        sums = jax.device_get(state.sums)
        n = int(sums.examples)
        train = Evaluation(
            float(sums.margin) / n, float(sums.reconstruction) / n, n - int(sums.correct), n, None
        )
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": int(state.step),
            "learning_rate": f"{float(plan.schedule(epoch * plan.steps)):.6g}",
            "seconds": f"{seconds:.2f}",
            "images_per_second": f"{n / seconds:.1f}",
        }
        for split, figures in (("train", train), ("validation", validation), ("test", test)):
            if figures is None:
                continue
            loss = figures.margin + plan.recipe.lam_recon * figures.reconstruction
            row[f"{split}_loss"] = f"{loss:.6f}"
            row[f"{split}_margin"] = f"{figures.margin:.6f}"
            row[f"{split}_reconstruction"] = f"{figures.reconstruction:.6f}"
            row[f"{split}_error"] = f"{figures.error:.4f}"
        return row

    def _place(self, images: np.ndarray, labels: np.ndarray) -> tuple[jax.Array, jax.Array]:
        mesh = self.plan.mesh
        return sharding.replicate(mesh, images), sharding.replicate(mesh, labels)


def epoch_order(plan: Plan, epoch: int) -> np.ndarray:
    """The batches of an epoch, int32 [steps, batch]: the same for the same seed, also resumed."""
    order = np.random.default_rng((plan.seed, epoch)).permutation(plan.train_indices)
    return order[: plan.steps * plan.batch_size].reshape(plan.steps, plan.batch_size)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the step under way ends; a second one ends at once."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)
        tqdm.write(f"{signal.Signals(number).name}: one more step and a checkpoint, then the end")

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(row: dict[str, Any], epochs: int) -> str:
    """A row of metrics.csv as the line that a person reads."""
    parts = [
        f"{split} loss {row[f'{split}_loss']} error {float(row[f'{split}_error']):.2f} %"
        for split in ("train", "validation", "test")
        if f"{split}_loss" in row
    ]
    speed = f"{float(row['seconds']):.0f} s, {float(row['images_per_second']):.0f} images/s"
    return f"epoch {row['epoch']}/{epochs}: {', '.join(parts)}, {speed}"

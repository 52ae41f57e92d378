"""The loop of a run: epochs of steps, evaluation, checkpoints, and how it ends."""

import math
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from tqdm import tqdm

import run_folder
import start
from allocator import give_back_freed_memory
from capsjax import sharding
from capsjax._trees import fill, named_leaves
from capsjax.checkpoint import Checkpoints
from capsjax.train import Metrics, Report, TrainState, jit_steps
from plan import Plan
from signals import StopSignals

# Steps in flight on an accelerator: enough to keep it busy while the host reads results. On a CPU
# none: they gain nothing there, a signal would wait for them, and steps of several devices that
# nobody waits for are a deadlock. Each step needs a thread for every device at once, to add up the
# gradients; the threads of two steps can take each other's places. On one host more than about 16
# such steps abort the process, and two processes with two devices each just hang.
_IN_FLIGHT = 4


class Diverged(ArithmeticError):
    """Something stopped being a finite number."""


class Stopped(SystemExit):
    """A signal came during an evaluation; it ends the run, after a checkpoint while it trains."""


class Figures(NamedTuple):
    """Means over a set of images."""

    margin: float
    reconstruction: float
    wrong: int
    examples: int
    classes: np.ndarray  # int32: what each image was taken for; empty in training

    @classmethod
    def of(cls, sums: Metrics, classes: np.ndarray) -> "Figures":
        n = int(sums.examples)
        margin, reconstruction = float(sums.margin) / n, float(sums.reconstruction) / n
        return cls(margin, reconstruction, n - int(sums.correct), n, classes)

    @property
    def error(self) -> float:
        """Percent."""
        return 100 * self.wrong / self.examples

    def loss(self, lam_recon: float) -> float:
        return self.margin + lam_recon * self.reconstruction


class Runner:
    """A plan on its devices."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._train, self._evaluate = jit_steps(plan.recipe, plan.mesh)
        data = plan.dataset
        self._train_set = self._place(data.x_train, data.y_train)
        self._test_set = self._place(data.x_test, data.y_test)
        self._key = jax.random.key(plan.settings.recipe.seed)
        platform = plan.mesh.devices.flat[0].platform
        self._in_flight = 0 if platform == "cpu" else _IN_FLIGHT
        together = jax.process_count() > 1 and not plan.settings.run.testing
        self._signals = StopSignals(together=together)
        self._names: list[str] = []  # of the arrays of parameters

    def train(
        self, folder: Path, state: TrainState, notes: dict[str, Any]
    ) -> tuple[TrainState, Figures]:
        """Trains from `state` to the last epoch.

        Returns the last state, or the best on the validation images if there are any, and its
        figures on the test images.

        Raises:
          Diverged: at the first step in which something is not finite, naming what was so first,
            or the end of the first epoch after which a validation or test loss is not.
          SystemExit: after SIGINT or SIGTERM and the checkpoint that follows it, status 128 + n.
        """
        plan, test = self.plan, None
        self._names = [name for name, _ in named_leaves(state.params)]
        # Sums at an epoch's last step: its evaluation is still to do, so it is not done yet.
        unfinished = int(state.sums.examples) > 0
        state = jax.device_put(state, sharding.replicated(plan.mesh))
        done, epochs = (int(state.step) - unfinished) // plan.steps, plan.settings.recipe.epochs
        rows: list[dict[str, Any]] = [*run_folder.read_rows(folder)[:done]]
        seconds = notes.get("seconds", 0.0)
        with start.checkpoints(folder) as checkpoints, self._signals:
            if self._signals.stop():
                self._end(checkpoints, state, seconds)
            for epoch in range(done, epochs):
                state, seconds = self._epoch(epoch, state, seconds, checkpoints)
                held_out = plan.validation_indices
                try:
                    validation = self.evaluate(state, held_out) if len(held_out) else None
                    test = self.evaluate(state)
                except Stopped:
                    self._end(checkpoints, state, seconds)
                rows.append(self._row(epoch, state, validation, test, seconds))
                # The row before its checkpoint: a run killed between them does the end of the
                # epoch again, and its row; the other way round the row would be lost.
                if jax.process_index() == 0:
                    run_folder.write_rows(folder, rows)
                # Placed like the rest of the state: the next epoch runs the same compiled step.
                zeros = jax.device_put(Metrics.zeros(), sharding.replicated(plan.mesh))
                state, seconds = state._replace(sums=zeros), 0.0
                error = validation.error / 100 if validation else None
                self._save(checkpoints, state, seconds, error)
                print(_summary(rows[-1], epochs), flush=True)
            if len(plan.validation_indices):
                checkpoints.wait()
                best = checkpoints.best()
                print(f"best on the validation images: epoch {best.step // plan.steps}")
                state, test = fill(state, best.arrays), None
        if self._signals.stop():  # after the last evaluation: --resume tells the result
            raise SystemExit(self._signals.status)
        return state, test or self.evaluate(state)

    def evaluate(self, state: TrainState, train_indices: np.ndarray | None = None) -> Figures:
        """Evaluates on the test images, or on some of the training images for validation.

        Raises:
          Diverged: if a loss is not finite.
          Stopped: after a signal, between two batches.
        """
        images, labels = self._test_set if train_indices is None else self._train_set
        indices = np.arange(len(labels), dtype=np.int32) if train_indices is None else train_indices
        size = self.plan.settings.recipe.batch_size
        filled = -len(indices) % size  # the last batch is filled up with images that do not count
        batches = np.pad(indices, (0, filled)).reshape(-1, size)
        counts = (np.arange(batches.size) < len(indices)).reshape(batches.shape)
        params = jax.device_put(state.params, sharding.replicated(self.plan.mesh))
        results = []
        for batch, counted in zip(batches, counts, strict=True):
            if self._signals.stop():
                raise Stopped(self._signals.status)
            placed = (sharding.place(self.plan.mesh, array) for array in (batch, counted))
            results.append(self._evaluate(params, images, labels, *placed))
            jax.block_until_ready(results[-1 - self._in_flight :][0])
        metrics, classes = zip(*jax.device_get(results), strict=True)
        sums = Metrics(*(sum(values) for values in zip(*metrics, strict=True)))
        figures = Figures.of(sums, np.concatenate(classes)[: len(indices)])
        split = "test" if train_indices is None else "validation"
        _require_finite_losses(state.step, figures, f"{split} ")
        return figures

    def _epoch(
        self,
        epoch: int,
        state: TrainState,
        seconds: float,
        checkpoints: Checkpoints,
    ) -> tuple[TrainState, float]:
        """Does the steps that are left of an epoch; `seconds` are the epoch's so far."""
        plan, every = self.plan, self.plan.settings.run.checkpoint_steps
        first = int(state.step) - epoch * plan.steps
        in_flight: deque[Report] = deque()
        begin = time.perf_counter() - seconds
        with self._bar(epoch, first) as bar:
            for number, batch in enumerate(plan.epoch_order(epoch)[first:], first + 1):
                batch = sharding.place(plan.mesh, batch)
                state, report = self._train(state, self._key, *self._train_set, batch)
                in_flight.append(report)
                if len(in_flight) > self._in_flight:
                    self._read(in_flight.popleft(), bar)
                ends, due = number == plan.steps, number % every == 0
                stop = self._signals.stop()
                while in_flight and (ends or due or stop):
                    self._read(in_flight.popleft(), bar)
                if number == first + 1:  # compiled, or evaluated, before it
                    give_back_freed_memory()
                seconds = time.perf_counter() - begin
                if stop:
                    self._end(checkpoints, state, seconds)
                if due and not ends:
                    self._save(checkpoints, state, seconds)
        return state, seconds

    def _save(
        self,
        checkpoints: Checkpoints,
        state: TrainState,
        seconds: float,
        validation_error: float | None = None,
    ) -> None:
        """Saves a state that is finite; its step has looked only at what it began with."""
        arrays = dict(named_leaves(jax.device_get(state)))
        bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
        if bad:
            raise Diverged(f"step {state.step}: not finite after it: {', '.join(bad)}")
        checkpoints.save(state, {"seconds": seconds}, validation_error)

    def _end(self, checkpoints: Checkpoints, state: TrainState, seconds: float) -> NoReturn:
        """Ends the run after a signal, with a checkpoint."""
        self._save(checkpoints, state, seconds)
        checkpoints.wait()
        print(f"stopped   step {state.step}; --resume {checkpoints.folder.parent} goes on")
        raise SystemExit(self._signals.status)

    def _read(self, report: Report, bar: tqdm) -> None:
        """Shows a step's figures, or stops the run over them."""
        report = jax.device_get(report)
        figures = Figures.of(report.metrics, np.empty(0))
        self._require_finite(report, figures)
        bar.set_postfix(
            loss=f"{figures.loss(self.plan.recipe.lam_recon):.4f}",
            accuracy=f"{100 - figures.error:.1f} %",
            refresh=False,
        )
        bar.update(figures.examples)

    def _require_finite(self, report: Report, figures: Figures) -> None:
        """Looks at what a step computed in the order in which it did."""
        if not math.isfinite(report.pixels):
            raise Diverged(f"step {report.step}: the mean of its pixels is {report.pixels}")
        self._require_finite_arrays(report.step, "parameters", report.parameters)
        _require_finite_losses(report.step, figures)
        self._require_finite_arrays(report.step, "gradient of", report.gradient)

    def _require_finite_arrays(self, step: Any, kind: str, lengths: jax.Array) -> None:
        """Names all of a kind that are not finite, for they come in no order."""
        bad = [name for name, n in zip(self._names, lengths, strict=True) if not math.isfinite(n)]
        if bad:
            raise Diverged(f"step {step}: not finite: {kind} {', '.join(bad)}")

    def _bar(self, epoch: int, first: int) -> tqdm:
        size = self.plan.settings.recipe.batch_size
        return tqdm(
            desc=f"epoch {epoch + 1}/{self.plan.settings.recipe.epochs}",
            total=self.plan.steps * size,
            initial=first * size,
            unit=" images",
            leave=False,
            disable=True if jax.process_index() else None,  # no bar where nobody watches
            bar_format="{desc} {percentage:3.0f}% {bar} {rate_fmt}, {remaining} left{postfix}",
        )

    def _row(
        self,
        epoch: int,
        state: TrainState,
        validation: Figures | None,
        test: Figures,
        seconds: float,
    ) -> dict[str, Any]:
        """The epoch's row of metrics.csv: losses are means over images, errors percent."""
        train = Figures.of(jax.device_get(state.sums), np.empty(0))
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": int(state.step),
            "learning_rate": f"{float(self.plan.schedule(epoch * self.plan.steps)):.6g}",
            "seconds": f"{seconds:.2f}",
            "images_per_second": f"{train.examples / seconds:.1f}",
        }
        for split, figures in (("train", train), ("validation", validation), ("test", test)):
            if figures is not None:
                row[f"{split}_loss"] = f"{figures.loss(self.plan.recipe.lam_recon):.6f}"
                row[f"{split}_margin"] = f"{figures.margin:.6f}"
                row[f"{split}_reconstruction"] = f"{figures.reconstruction:.6f}"
                row[f"{split}_error"] = f"{figures.error:.4f}"
        return row

    def _place(self, images: np.ndarray, labels: np.ndarray) -> tuple[jax.Array, jax.Array]:
        mesh = self.plan.mesh
        return sharding.replicate(mesh, images), sharding.replicate(mesh, labels)


def _require_finite_losses(step: Any, figures: Figures, split: str = "") -> None:
    for quantity in ("margin", "reconstruction"):
        loss = getattr(figures, quantity)
        if not math.isfinite(loss):
            raise Diverged(f"step {step}: the {split}{quantity} loss is {loss}")


def _summary(row: dict[str, Any], epochs: int) -> str:
    """A row of metrics.csv as the line that a person reads."""
    parts = [
        f"{split} loss {row[f'{split}_loss']} error {float(row[f'{split}_error']):.2f} %"
        for split in ("train", "validation", "test")
        if f"{split}_loss" in row
    ]
    speed = f"{float(row['seconds']):.0f} s, {float(row['images_per_second']):.0f} images/s"
    return f"epoch {row['epoch']}/{epochs}: {', '.join(parts)}, {speed}"

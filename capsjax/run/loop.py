"""The loop of a run: epochs of steps, evaluation, checkpoints, and how it ends."""

import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.stages import Wrapped
from tqdm import tqdm

from capsjax import sharding
from capsjax._trees import fill, named_leaves
from capsjax.checkpoint import Checkpoints
from capsjax.run.folder import read_rows, write_rows
from capsjax.run.machine import measure_resident_memory, return_freed_memory
from capsjax.run.metrics import Metrics, average, make_row, summarize
from capsjax.run.opening import open_checkpoints
from capsjax.run.plan import Plan
from capsjax.run.signals import StopSignals
from capsjax.train import Diagnostics, Sums, TrainState, jit_steps, zero_sums

# Steps in flight on an accelerator: enough to keep it busy while the host reads diagnostics. On a
# CPU none: they gain nothing there, a signal would wait for them, and steps of several devices that
# nobody waits for deadlock. Each step needs a thread for every device at once, to add up the
# gradients, and the threads of two steps can take each other's places. On one host more than about
# 16 such steps abort the process; two processes with two devices each hang.
_IN_FLIGHT = 4

# glibc may keep, for small objects, the few bytes by which it had aligned a large buffer. Then the
# buffer of the next call does not fit where this one was, and takes new room, while the old stays
# resident until it is returned. That happens in the first calls of a step, and seldom later; to
# return memory after every call would cost each 0.1 s, in which its pages are faulted in again.
_SETTLING = 4  # calls
_MOVED = 2**26  # bytes by which a process grows from one call to the next if a large buffer moved


class Diverged(ArithmeticError):
    """A number that training depends on is no longer finite."""


class Stopped(SystemExit):
    """A signal came during an evaluation; it ends the run, after a checkpoint while it trains."""


class Runner:
    """Trains and evaluates a plan on its devices."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._train, self._evaluate = jit_steps(plan.setup, plan.mesh)
        data = plan.dataset
        self._train_set = self._place(data.x_train, data.y_train)
        self._test_set = self._place(data.x_test, data.y_test)
        self._key = jax.random.key(plan.settings.recipe.seed)
        platform = plan.mesh.devices.flat[0].platform
        self._in_flight = 0 if platform == "cpu" else _IN_FLIGHT
        collective = jax.process_count() > 1 and not plan.settings.run.testing
        self._signals = StopSignals(collective=collective)
        self._param_names: list[str] = []
        self._calls: Counter[str] = Counter()  # of both steps
        self._resident = 0  # bytes, after the last call of either

    def train(
        self, folder: Path, state: TrainState, notes: dict[str, Any]
    ) -> tuple[TrainState, Metrics, np.ndarray]:
        """Trains from `state` to the last epoch, or to the first that reaches the target.

        Returns the last state, or the best on the validation images if there are any, its metrics
        on the test images, and their predicted classes.

        Raises:
          Diverged: at the first step whose pixels, losses or gradient are not finite, at the first
            checkpoint of parameters that are not, or after the first epoch whose validation or test
            loss is not.
          SystemExit: after SIGINT or SIGTERM and the checkpoint that follows it, status 128 + n.
        """
        plan, tested = self.plan, None
        self._param_names = [name for name, _ in named_leaves(state.params)]
        # Non-zero sums on an epoch boundary: that epoch was trained but not yet evaluated.
        unfinished = int(state.sums.examples) > 0
        state = jax.device_put(state, sharding.replicated(plan.mesh))
        done, epochs = (int(state.step) - unfinished) // plan.steps, plan.settings.training.epochs
        rows: list[dict[str, Any]] = [*read_rows(folder, plan.columns)[:done]]
        seconds = notes.get("seconds", 0.0)
        with open_checkpoints(folder) as checkpoints, self._signals:
            if self._signals.stop():
                self._end(checkpoints, state, seconds)
            for epoch in range(done, epochs):
                if self._has_reached_target(rows):
                    break
                state, seconds = self._train_epoch(epoch, state, seconds, checkpoints)
                validated, tested = self._evaluate_epoch(state, seconds, checkpoints)
                rows.append(self._make_row(epoch, state, seconds, validated, tested[0]))
                # The row before its checkpoint: a run killed between them repeats the end of the
                # epoch, and its row; the other way round the row would be lost.
                if jax.process_index() == 0:
                    write_rows(folder, rows, plan.columns)
                state, seconds = state._replace(sums=self._zero(state.sums)), 0.0
                error = validated.error / 100 if validated else None
                self._save(checkpoints, state, seconds, error)
                print(summarize(rows[-1], epochs), flush=True)
            if plan.settings.training.target is not None:
                self._tell_target(rows)
            if len(plan.validation_indices):
                state, tested = self._take_best(state, checkpoints), None
        if self._signals.stop():  # after the last evaluation: --resume tells the result
            raise SystemExit(self._signals.status)
        metrics, predicted = tested or self.evaluate(state)
        return state, metrics, predicted

    def evaluate(
        self, state: TrainState, train_indices: np.ndarray | None = None
    ) -> tuple[Metrics, np.ndarray]:
        """Evaluates on the test images, or on some of the training images for validation.

        Returns their metrics and predicted classes, int32 [N].

        Raises:
          Diverged: if a loss is not finite.
          Stopped: after a signal, between two batches.
        """
        images, labels = self._test_set if train_indices is None else self._train_set
        indices = train_indices
        if indices is None:
            indices = np.arange(self.plan.setup.task.count_tests(len(labels)), dtype=np.int32)
        state = jax.device_put(state, sharding.replicated(self.plan.mesh))
        results: list[tuple[Sums, jax.Array]] = []
        for batch, counted in self._fill_batches(indices):
            if self._signals.stop():
                raise Stopped(self._signals.status)
            placed = (sharding.place(self.plan.mesh, array) for array in (batch, counted))
            arguments = state, images, labels, *placed
            if not results:
                _compile(self._evaluate, *arguments)
            results.append(self._evaluate(*arguments))
            jax.block_until_ready(results[-1 - self._in_flight :][0])
            self._settle("evaluate")
        sums, predicted = zip(*jax.device_get(results), strict=True)
        metrics = average(jax.tree.map(lambda *values: sum(values), *sums))
        split = "test" if train_indices is None else "validation"
        _require_finite_losses(state.step, metrics, f"{split} ")
        return_freed_memory()  # what evaluation used
        return metrics, np.concatenate(predicted)[: len(indices)]

    def _fill_batches(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields whole batches; examples that fill up the last one do not count."""
        size = self.plan.settings.training.batch_size
        batches = np.pad(indices, (0, -len(indices) % size)).reshape(-1, size)
        counted = (np.arange(batches.size) < len(indices)).reshape(batches.shape)
        yield from zip(batches, counted, strict=True)

    def _train_epoch(
        self, epoch: int, state: TrainState, seconds: float, checkpoints: Checkpoints
    ) -> tuple[TrainState, float]:
        """Does the steps that are left of an epoch; `seconds` are the epoch's so far."""
        plan, every = self.plan, self.plan.settings.run.checkpoint_steps
        first = int(state.step) - epoch * plan.steps
        in_flight: deque[Diagnostics] = deque()
        begin = time.perf_counter() - seconds
        with self._bar(epoch, first) as bar:
            order = sharding.place(plan.mesh, plan.epoch_order(epoch), axis=1)
            _compile(self._train, state, self._key, *self._train_set, order)
            for number in range(first + 1, plan.steps + 1):
                state, diagnostics = self._train(state, self._key, *self._train_set, order)
                in_flight.append(diagnostics)
                if len(in_flight) > self._in_flight:
                    self._read(in_flight.popleft(), bar)
                ends, due = number == plan.steps, number % every == 0
                stop = self._signals.stop()
                while in_flight and (ends or due or stop):
                    self._read(in_flight.popleft(), bar)
                self._settle("train")
                seconds = time.perf_counter() - begin
                if stop:
                    self._end(checkpoints, state, seconds)
                if due and not ends:
                    self._save(checkpoints, state, seconds)
        return state, seconds

    def _settle(self, step: str) -> None:
        """Returns the memory that a step freed: after its first calls, and if its buffers moved."""
        self._calls[step] += 1
        resident = measure_resident_memory()
        if self._calls[step] <= _SETTLING or resident > self._resident + _MOVED:
            return_freed_memory()
        self._resident = resident

    def _evaluate_epoch(
        self, state: TrainState, seconds: float, checkpoints: Checkpoints
    ) -> tuple[Metrics | None, tuple[Metrics, np.ndarray]]:
        """Evaluates on the validation images, if there are any, and on the test images."""
        held_out = self.plan.validation_indices
        try:
            validated = self.evaluate(state, held_out)[0] if len(held_out) else None
            return validated, self.evaluate(state)
        except Stopped:
            self._end(checkpoints, state, seconds)

    def _has_reached_target(self, rows: list[dict[str, Any]]) -> bool:
        """Returns whether the last epoch's validation accuracy is what is asked for."""
        target = self.plan.settings.training.target
        if target is None or not rows:
            return False
        return round(100 - float(rows[-1]["validation_error"]), 6) >= target

    def _tell_target(self, rows: list[dict[str, Any]]) -> None:
        target = self.plan.settings.training.target
        if self._has_reached_target(rows):
            print(f"target    {target} % of the validation images, reached after epoch {len(rows)}")
        else:
            print(f"target    {target} % of the validation images, not reached")

    def _take_best(self, state: TrainState, checkpoints: Checkpoints) -> TrainState:
        """Returns the state after the epoch of least validation error."""
        checkpoints.wait()
        best = checkpoints.best()
        print(f"best on the validation images: epoch {best.step // self.plan.steps}")
        return fill(state, best.arrays)

    def _save(
        self,
        checkpoints: Checkpoints,
        state: TrainState,
        seconds: float,
        validation_error: float | None = None,
    ) -> None:
        """Checks the whole state, then saves it: a step's diagnostics cover its inputs only."""
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

    def _read(self, diagnostics: Diagnostics, bar: tqdm) -> None:
        """Shows a step's metrics, or stops the run because of them."""
        diagnostics = jax.device_get(diagnostics)
        metrics = average(diagnostics.sums)
        self._require_finite(diagnostics, metrics)
        accuracy = f"{100 - metrics.error:.1f} %"
        bar.set_postfix(loss=f"{metrics.loss:.4f}", accuracy=accuracy, refresh=False)
        bar.update(metrics.examples)

    def _require_finite(self, step: Diagnostics, metrics: Metrics) -> None:
        """Checks in the order of computation, so that what was not finite first is named."""
        if not math.isfinite(step.pixel_mean):
            raise Diverged(f"step {step.step}: the mean of its pixels is {step.pixel_mean}")
        _require_finite_losses(step.step, metrics)
        named = zip(self._param_names, step.gradient_norms, strict=True)
        bad = [name for name, norm in named if not math.isfinite(norm)]
        if bad:
            raise Diverged(f"step {step.step}: not finite: gradient of {', '.join(bad)}")

    def _bar(self, epoch: int, first: int) -> tqdm:
        training = self.plan.settings.training
        return tqdm(
            desc=f"epoch {epoch + 1}/{training.epochs}",
            total=self.plan.steps * training.batch_size,
            initial=first * training.batch_size,
            unit=" images",
            leave=False,
            disable=True if jax.process_index() else None,  # None: no bar outside a terminal
            bar_format="{desc} {percentage:3.0f}% {bar} {rate_fmt}, {remaining} left{postfix}",
        )

    def _make_row(
        self,
        epoch: int,
        state: TrainState,
        seconds: float,
        validated: Metrics | None,
        tested: Metrics,
    ) -> dict[str, Any]:
        metrics = {"train": average(jax.device_get(state.sums)), "test": tested}
        if validated is not None:
            metrics = {"train": metrics["train"], "validation": validated, "test": tested}
        rate = float(self.plan.schedule(epoch * self.plan.steps))
        return make_row(epoch + 1, int(state.step), rate, seconds, metrics)

    def _zero(self, sums: Sums) -> Sums:
        """Returns zeros placed like the rest of the state, so that nothing compiles again."""
        return jax.device_put(zero_sums(tuple(sums.losses)), sharding.replicated(self.plan.mesh))

    def _place(
        self, images: np.ndarray, labels: np.ndarray
    ) -> tuple[sharding.PlacedImages, jax.Array]:
        mesh = self.plan.mesh
        return sharding.replicate_images(mesh, images), sharding.replicate(mesh, labels)


def _compile(step: Wrapped, *arguments: Any) -> None:
    """Compiles a step unless it is compiled, and returns what other steps and compiling freed.

    The step's own buffers would find no room in those pieces.
    """
    return_freed_memory()
    step.lower(*arguments).compile()
    return_freed_memory()


def _require_finite_losses(step: Any, metrics: Metrics, split: str = "") -> None:
    """Checks the parts before their total, which is not finite if one of them is not."""
    for name in sorted(metrics.losses, key=lambda name: name == "loss"):
        if not math.isfinite(loss := metrics.losses[name]):
            what = "total" if name == "loss" else name
            raise Diverged(f"step {step}: the {split}{what} loss is {loss}")

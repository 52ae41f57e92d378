"""Checkpoints of a run, each with a checksum.

Orbax writes and prunes them in the background. It does not notice a flipped byte when it reads a
checkpoint, so each carries a CRC-32 of its whole content, and one that fails it does not count.
"""

import contextlib
import json
import math
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from capsjax._trees import WeightsError, named_leaves
from capsjax.train import TrainState


class CheckpointError(WeightsError):
    """Raised when there is no sound checkpoint, or one cannot be written."""


class Checkpoint(NamedTuple):
    """A checkpoint that was read back."""

    step: int
    arrays: dict[str, np.ndarray]  # by their path in the state, such as `params.conv1.kernel`
    notes: dict[str, Any]  # what `save` was given
    unsound: list[int]  # newer steps that were passed over because they are damaged


class Checkpoints:
    """Keeps the checkpoints of a folder: the last two, and the one of least validation error.

    Args:
      folder: made if it is not there.

    Raises:
      OSError: if the folder cannot be made.

    References:
      Orbax, where an interrupted save never becomes a checkpoint.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._replaced = folder / ".replaced"  # holds a checkpoint while its step is saved again
        self._saved = False
        self._errors: dict[int, float] = {}  # of the steps that have one
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LastTwoAndBest(self._errors),
            # How long processes wait for one whose write failed; the default is 20 minutes.
            async_options=ocp.AsyncOptions(timeout_secs=120),
        )
        self._manager = _Manager(folder.absolute(), options=options)
        for step in self._manager.all_steps():
            with contextlib.suppress(CheckpointError):
                self._set_error(step, self._about(step)["error"])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()
        self._manager.close()

    def save(self, state: TrainState, notes: dict[str, Any], error: float | None = None) -> None:
        """Saves a state in the background, under its step.

        Args:
          state: copied before this returns, so that it may be donated at once.
          notes: anything JSON holds.
          error: validation error from 0 to 1 at an epoch's end, by which the best is chosen.

        Raises:
          CheckpointError: if it, or the one before it, cannot be written.
        """
        leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(state)}
        # One array: if several are damaged, Orbax reports one and lets the others fail unseen. Also
        # a copy: on a CPU the leaves are views of arrays that may be donated.
        content = np.concatenate([leaf.reshape(-1).view(np.uint8) for leaf in leaves.values()])
        about = {
            "arrays": [[name, leaf.dtype.name, leaf.shape] for name, leaf in leaves.items()],
            "crc32": zlib.crc32(content.data),
            "error": error,
            "notes": notes,
        }
        # The checksum is that of what is read back: JSON turns keys into strings.
        about = json.loads(json.dumps(about))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave({"content": content}),
            about=ocp.args.JsonSave({**about, "about_crc32": _digest(about)}),
        )
        step = int(leaves["step"])
        self.wait()  # Orbax would delete a checkpoint that it is still writing
        with _writing():
            # Later steps were found damaged; Orbax refuses a step older than its newest.
            for later in (n for n in self._manager.all_steps() if n > step):
                self._manager.delete(later)
                self._set_error(later, None)
            if step in self._manager.all_steps():
                self._put_aside(step)
            self._manager.save(step, args=items)
            self._saved = True
        self._set_error(step, error)  # last: the former best is kept until the next save

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
          CheckpointError: if it cannot be written.
        """
        with _writing():
            saved, self._saved = self._saved, False
            self._manager.wait_until_finished()
            if saved and jax.process_index() == 0:
                shutil.rmtree(self._replaced, ignore_errors=True)

    def last(self) -> Checkpoint | None:
        """Returns the newest sound checkpoint, or None if there has been none yet.

        Raises:
          CheckpointError: if there are checkpoints and all are damaged.
        """
        kept = [int(path.name) for path in self._replaced.glob("*") if path.name.isdigit()]
        steps = sorted({*self._manager.all_steps(), *kept}, reverse=True)
        for tried, step in enumerate(steps):
            try:
                return self._read(step)._replace(unsound=steps[:tried])
            except CheckpointError:
                continue
        if steps:
            raise CheckpointError(f"all checkpoints in {self.folder} are damaged: steps {steps}")
        return None

    def best(self) -> Checkpoint:
        """Returns the checkpoint of least validation error; without validation, the last one.

        Raises:
          CheckpointError: if there is none, or it is damaged.
        """
        step = _best(self._errors)
        checkpoint = self.last() if step is None else self._read(step)
        if checkpoint is None:
            raise CheckpointError(f"there is no checkpoint in {self.folder} yet")
        return checkpoint

    def _put_aside(self, step: int) -> None:
        """Sets a checkpoint aside until another one of the same step is written."""
        if jax.process_index() == 0:
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._replaced.mkdir()
            (self.folder / str(step)).rename(self._replaced / str(step))
        multihost_utils.sync_global_devices("put aside")
        self._manager.reload()

    def _set_error(self, step: int, error: float | None) -> None:
        self._errors.pop(step, None)
        if error is not None:
            self._errors[step] = error

    def _read(self, step: int) -> Checkpoint:
        about = self._about(step)
        content = self._restore(step, state=ocp.args.StandardRestore())["content"]
        if zlib.crc32(content) != about["crc32"]:
            raise CheckpointError(f"the checkpoint of step {step} was altered after it was written")
        arrays, start = {}, 0
        for name, dtype, shape in about["arrays"]:
            array = np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape)
            arrays[name], start = array, start + array.nbytes
        return Checkpoint(step, arrays, about["notes"], [])

    def _about(self, step: int) -> dict[str, Any]:
        about = self._restore(step, about=ocp.args.JsonRestore())
        if about.pop("about_crc32", None) != _digest(about):
            raise CheckpointError(f"the checkpoint of step {step} was altered after it was written")
        return about

    def _restore(self, step: int, **item: ocp.args.CheckpointArgs) -> dict[str, Any]:
        """Restores one item, which is given by its name."""
        self.wait()
        try:
            with contextlib.ExitStack() as stack:
                manager = self._manager
                if step not in manager.all_steps():
                    manager = stack.enter_context(_Manager(self._replaced.absolute()))
                read = manager.restore(step, args=ocp.args.Composite(**item))
                return dict(read[next(iter(item))])
        except Exception as error:  # a damaged file makes Orbax raise anything
            raise CheckpointError(f"the checkpoint of step {step} cannot be read") from error


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Disabled: each call advances JAX's preemption counter, which the training loop owns."""
        return False


class _LastTwoAndBest(PreservationPolicy):
    """Keeps two, so that one damaged checkpoint never loses the run, and the best."""

    def __init__(self, errors: dict[int, float]):
        self._errors = errors

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-2:], _best(self._errors)}
        return [step in kept for step in steps]


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError:  # another process is gone
        raise
    except Exception as error:  # a full disk makes Orbax raise anything
        reason = str(error).partition("\n")[0]
        gone = " (or another process is gone)" if jax.process_count() > 1 else ""
        raise CheckpointError(f"a checkpoint cannot be written{gone}: {reason}") from error


def _best(errors: dict[int, float]) -> int | None:
    """Returns the step of least error, the last of equal ones; None if no step has an error."""
    return min(errors, key=lambda step: (errors[step], -step), default=None)


def _digest(about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())

"""Checkpoints of a run, and what makes them trustworthy: a digest of every array.

Orbax writes and prunes them, in the background. It does not notice a flipped byte when it reads
one, so each checkpoint carries a CRC-32 of every array, and one that fails it does not count.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from capsjax.train import TrainState


class CheckpointError(ValueError):
    """No sound checkpoint, or one of another network."""


class Checkpoint(NamedTuple):
    """What was read back."""

    step: int
    arrays: dict[str, np.ndarray]  # by their path in the state, as `params.conv1.kernel`
    notes: dict[str, Any]  # what `save` was given
    unsound: list[int]  # newer steps that were damaged, and so passed over


class Checkpoints:
    """The checkpoints in a folder: the last two, and the one of least validation error.

    Args:
      folder: made if it is not there.

    Raises:
      OSError: if the folder cannot be made.

    References:
      Orbax, whose save that is cut short never becomes a checkpoint.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        kept = BestN(
            get_metric_fn=_error, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        # Two, so that one damaged checkpoint never loses the run.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(2), kept]),
            best_fn=_error,
            best_mode="min",
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()  # waits for a save under way

    def save(self, state: TrainState, notes: dict[str, Any], error: float | None = None) -> None:
        """Saves a state in the background, under its step.

        Args:
          state: copied before this returns, so it may be donated at once.
          notes: anything JSON holds.
          error: validation error between 0 and 1, at an epoch's end, for choosing the best.
        """
        # np.array copies; on a CPU np.asarray is a view of a buffer that the next step reuses.
        arrays = {name: np.array(leaf) for name, leaf in named_leaves(state)}
        step = int(arrays["step"])
        if step in self._manager.all_steps():
            self._manager.delete(step)
        digests = {name: _digest(array) for name, array in arrays.items()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            notes=ocp.args.JsonSave({"digests": digests, "notes": notes}),
        )
        self._manager.save(step, args=items, metrics=None if error is None else {"error": error})

    def wait(self) -> None:
        """Waits until what was saved is on the disk."""
        self._manager.wait_until_finished()

    def last(self) -> Checkpoint | None:
        """The newest sound checkpoint, or None if there has been none yet.

        Raises:
          CheckpointError: if there are checkpoints and all are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for tried, step in enumerate(steps):
            try:
                return self._read(step)._replace(unsound=steps[:tried])
            except CheckpointError:
                continue
        if steps:
            raise CheckpointError(f"all checkpoints in {self.folder} are damaged: steps {steps}")
        return None

    def best(self) -> Checkpoint:
        """The checkpoint of least validation error; without validation, the last one.

        Raises:
          CheckpointError: if there is none, or it is damaged.
        """
        step = self._manager.best_step()
        checkpoint = self.last() if step is None else self._read(step)
        if checkpoint is None:
            raise CheckpointError(f"there is no checkpoint in {self.folder} yet")
        return checkpoint

    def _read(self, step: int) -> Checkpoint:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), notes=ocp.args.JsonRestore())
        try:
            read = self._manager.restore(step, args=items)
            arrays, digests = dict(read.state), read.notes["digests"]
        except Exception as error:  # a damaged file makes Orbax raise anything
            raise CheckpointError(f"the checkpoint of step {step} cannot be read") from error
        if {name: _digest(array) for name, array in arrays.items()} != digests:
            raise CheckpointError(f"the checkpoint of step {step} was altered after it was written")
        return Checkpoint(step, arrays, read.notes["notes"], [])


def fill(template: Any, arrays: dict[str, np.ndarray], prefix: str = "") -> Any:
    """Puts arrays into a tree of the same names and shapes.

    Args:
      template: the tree, whose leaves have shapes and dtypes.
      arrays: by their path.
      prefix: the path of `template` itself within `arrays`, with its dot, as `params.`.

    Returns:
      A tree like `template`.

    Raises:
      CheckpointError: naming the first array that is missing, left over, or of another shape.
    """
    expected = dict(named_leaves(template, prefix))
    found = {name: array for name, array in arrays.items() if name.startswith(prefix)}
    for name in sorted(expected.keys() | found.keys()):
        ours = list(expected[name].shape) if name in expected else "no such array"
        theirs = list(found[name].shape) if name in found else "no such array"
        if ours != theirs:
            raise CheckpointError(
                f"weights of another network: {name} is {ours} here and {theirs} there"
            )
    leaves = [found[name].astype(leaf.dtype) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def named_leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path, as `params.conv1.kernel`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield prefix + jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _digest(array: np.ndarray) -> int:
    return zlib.crc32(array.tobytes())


def _error(metrics: dict[str, float]) -> float:
    return metrics["error"]

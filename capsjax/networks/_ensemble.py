"""Several networks as one."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from capsjax.networks._network import Network, Output


class Ensemble(Network):
    """Several networks that answer together: their class scores are averaged.

    scores_j = mean_n scores_nj

    Members should score alike. Beside a network whose scores are logits, which have no bound, one
    whose scores are lengths, at most 1, hardly counts.

    Args:
      members: networks for the same images and classes; their sizes may differ.

    Called with images [..., H, W, C], returns an `Output`: scores [..., j], the members' capsules
    side by side [..., j, Σd], if each has some, and no reconstruction, since each member would draw
    its own.

    Raises:
      ValueError: if there are no members, or they are for other images or classes.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> members = [capsjax.CapsNet(channels=16, types=2, rngs=nnx.Rngs(seed)) for seed in (0, 1)]
      >>> net = capsjax.networks.Ensemble(members)
      >>> capsjax.predict(net, jnp.ones((5, 28, 28))).scores.shape
      (5, 10)

    References:
      Hansen, Salamon, "Neural Network Ensembles", 1990.
    """

    def __init__(self, members: Sequence[Network]):
        kinds = {(member.image_shape, member.num_classes) for member in members}
        if len(kinds) != 1:
            raise ValueError(
                "Ensemble: expected networks for the same images and classes, got "
                + (" and ".join(f"{list(shape)} in {n}" for shape, n in sorted(kinds)) or "none")
            )
        ((image_shape, num_classes),) = kinds
        super().__init__(tuple(member.config for member in members), image_shape, num_classes)
        self.members = nnx.List(members)

    def __call__(self, images: jax.Array, labels: ArrayLike | None = None) -> Output:
        outputs = [member(images) for member in self.members]
        scores = jnp.mean(jnp.stack([output.scores for output in outputs]), 0)
        capsules = [output.capsules for output in outputs if output.capsules is not None]
        together = jnp.concatenate(capsules, -1) if len(capsules) == len(outputs) else None
        return Output(scores, together, None)

"""What pays? One change at a time to what became the preset `best`, judged by held-out digits.

python experiments/trials.py --preset gradient --validation 10000 --precision bfloat16

Each trial changes one part of `control`, `elastic` one of `small-warps`. It trains on 50,000 digits
for 12 epochs. Equal trials differ by about 0.05 points from seed to seed, so only large differences
count. The losers stand in results/trials/ too; presets without a folder there are not trained yet.

A trial takes 28 min on one core of an AMD EPYC (Python 3.13, JAX 0.12, bfloat16). Two at once, each
on a core of its own (`taskset -c 0`), train 1.4 times as many images/s as one on both cores.
"""

import dataclasses
from typing import Any

from capsjax import Agreement
from capsjax.networks import CapsNetConfig
from capsjax.presets import BEST, Preset
from capsjax.run import Experiment, main

# The preset `best` as it was before the trials, and shorter.
CONTROL = dataclasses.replace(
    BEST.training, epochs=12, shift_pixels=2.8, rotation=10, shear=10, zoom=0.2, elastic=0
)
SMALL_WARPS: dict[str, Any] = {"rotation": 7, "shear": 5, "zoom": 0.1, "shift_pixels": 2}


def trial(network: CapsNetConfig | None = None, **training: Any) -> Preset:
    """Changes a part of the control."""
    changed = dataclasses.replace(CONTROL, **training)
    return dataclasses.replace(BEST, network=network or BEST.network, training=changed)


PRESETS = {
    "control": trial(),
    "no-reconstruction": trial(lam_recon=0.0),
    "small-warps": trial(**SMALL_WARPS),
    "elastic": trial(**SMALL_WARPS, elastic=1),  # differs from small-warps in one respect
    "gradient": trial(CapsNetConfig(routing=Agreement(stop_gradient=False))),
    "bias": trial(CapsNetConfig(routing=Agreement(bias=True))),
    "authors-initial-values": trial(
        CapsNetConfig(init="truncated_normal", primary_coupling=1 / 32)
    ),
    "batch-64": trial(batch_size=64),
    "batch-256": trial(batch_size=256),
}

TRIALS = Experiment(description="Try one change to the preset control.", presets=PRESETS)

if __name__ == "__main__":
    main(TRIALS)

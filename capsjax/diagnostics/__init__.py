"""What capsules and routing do: lengths, dead capsules, and how couplings behave.

Functions of arrays, whichever network they come from: `dead`, `score_histogram`, `active`,
`coupling_entropy`, `bonding`, `dynamics`. Functions of a network: `observe` looks into its capsule
layers, `diagnose` measures them all; `capsjax.viz.capsules` draws what it finds.

Letters: N examples, `...` leading axes, j output capsule, i input capsule.
"""

from capsjax.diagnostics._capsules import ScoreHistogram, dead, score_histogram
from capsjax.diagnostics._couplings import active, bonding, coupling_entropy, dynamics
from capsjax.diagnostics._diagnosis import (
    ClassScores,
    CouplingStatistics,
    Diagnosis,
    LayerActivations,
    diagnose,
)
from capsjax.diagnostics._layers import LayerState, Observation, observe

__all__ = [
    "ClassScores",
    "CouplingStatistics",
    "Diagnosis",
    "LayerActivations",
    "LayerState",
    "Observation",
    "ScoreHistogram",
    "active",
    "bonding",
    "coupling_entropy",
    "dead",
    "diagnose",
    "dynamics",
    "observe",
    "score_histogram",
]

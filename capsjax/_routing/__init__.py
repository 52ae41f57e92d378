"""Routings, one a file: pure functions, and the value of each that a capsule layer takes."""

from capsjax._routing._protocol import Routing
from capsjax._routing._votes import predictions
from capsjax._routing.agreement import Agreement, RoutingState, routing, routing_state
from capsjax._routing.dense import dense_capsules

# By the name that a saved network stores. A routing of your own joins with
# `capsjax.ROUTINGS[MyRouting.name] = MyRouting`.
ROUTINGS: dict[str, type[Routing]] = {kind.name: kind for kind in (Agreement,)}

__all__ = [
    "ROUTINGS",
    "Agreement",
    "Routing",
    "RoutingState",
    "dense_capsules",
    "predictions",
    "routing",
    "routing_state",
]

"""Routings, one a file: pure functions, and the value of each that a capsule layer takes."""

from capsjax._routing._competition import OverWindows
from capsjax._routing._dense_votes import DenseVotes
from capsjax._routing._matrix_votes import MatrixVotes
from capsjax._routing._protocol import Routing
from capsjax._routing._votes import Capsules, predictions
from capsjax._routing.agreement import Agreement, RoutingState, routing, routing_state
from capsjax._routing.attention import attention_routing
from capsjax._routing.dense import dense_capsules
from capsjax._routing.em import EM, EMState, em_routing
from capsjax._routing.random import Random, random_routing
from capsjax._routing.self_attention import SelfAttention, self_attention_routing
from capsjax._routing.self_routing import self_routing
from capsjax._routing.uniform import Uniform, uniform_routing
from capsjax._routing.variational import VariationalState, variational_routing

# By the name that a saved network stores. A routing of your own joins with
# `capsjax.ROUTINGS[MyRouting.name] = MyRouting`.
ROUTINGS: dict[str, type[Routing] | type[EM]] = {
    kind.name: kind for kind in (Agreement, Uniform, Random, SelfAttention, EM)
}

__all__ = [
    "EM",
    "ROUTINGS",
    "Agreement",
    "Capsules",
    "DenseVotes",
    "EMState",
    "MatrixVotes",
    "OverWindows",
    "Random",
    "Routing",
    "RoutingState",
    "SelfAttention",
    "Uniform",
    "VariationalState",
    "attention_routing",
    "dense_capsules",
    "em_routing",
    "predictions",
    "random_routing",
    "routing",
    "routing_state",
    "self_attention_routing",
    "self_routing",
    "uniform_routing",
    "variational_routing",
]

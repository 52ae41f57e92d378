"""Every routing as the layer of CapsNet's class capsules: with votes never made, and made first."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import capsjax
from benchmarking.worker import time_calls
from capsjax.run.machine import keep_freed_memory

_J, _I, _D, _K = 10, 1152, 16, 8
_ZEROS = np.zeros(_J, np.float32)


class Cost(NamedTuple):
    """What a layer and its gradients take."""

    seconds: float
    memory: float  # MiB of temporaries


def _self_routing(votes: Any, u: jax.Array, a: jax.Array) -> Any:
    logits = jnp.einsum("bik,jik->bji", u, jnp.full((_J, _I, _K), 0.1))
    return capsjax.self_routing(votes, a, logits)


# Functions of votes [b, j, i, d], and of input capsules [b, i, k] and their activations [b, i].
_ROUTINGS: dict[str, Callable[[Any, jax.Array, jax.Array], Any]] = {
    "agreement": lambda votes, u, a: capsjax.routing(votes),
    "agreement, leaky": lambda votes, u, a: capsjax.routing(votes, leak=True),
    "agreement, all gradients": lambda votes, u, a: capsjax.routing(votes, stop_gradient=False),
    "uniform": lambda votes, u, a: capsjax.uniform_routing(votes),
    "random": lambda votes, u, a: capsjax.random_routing(jax.random.key(0), votes),
    "self-attention": lambda votes, u, a: capsjax.self_attention_routing(votes),
    "inverted attention": lambda votes, u, a: capsjax.attention_routing(votes),
    "EM": lambda votes, u, a: capsjax.em_routing(votes, a, beta_u=_ZEROS, beta_a=_ZEROS)[:2],
    "variational Bayes": lambda votes, u, a: capsjax.variational_routing(votes, a)[:2],
    "self-routing": _self_routing,
}


def time_routings(batch: int, rounds: int, steps: int) -> dict[str, tuple[Cost, Cost]]:
    """Returns what each routing takes with `capsjax.DenseVotes`, and with the array of votes.

    On a CPU, with the allocator as capsjax.run sets it.
    """
    keep_freed_memory()
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return {name: _time_routing(name, batch, rounds, steps) for name in _ROUTINGS}


def _time_routing(name: str, batch: int, rounds: int, steps: int) -> tuple[Cost, Cost]:
    rng = np.random.default_rng(0)
    u = rng.normal(0, 0.3, (batch, _I, _K)).astype(np.float32)
    weight = rng.normal(0, 0.1, (_J, _I, _D, _K)).astype(np.float32)
    a = rng.uniform(0, 1, (batch, _I)).astype(np.float32)
    programs = [
        jax.jit(_differentiate(_ROUTINGS[name], form)).lower(u, weight, a).compile()
        for form in (capsjax.DenseVotes, capsjax.predictions)
    ]
    arrays = jax.device_put((u, weight, a))
    tasks = [lambda run=run: jax.block_until_ready(run(*arrays)) for run in programs]
    turns = [[time_calls(task, steps) for task in tasks] for _ in range(rounds)]
    never_made, made = (
        Cost(statistics.median(times), _count_temporaries(program))
        for times, program in zip(zip(*turns, strict=True), programs, strict=True)
    )
    return never_made, made


def _differentiate(routing: Callable, form: Callable) -> Callable:
    """Returns a function of u, W and a: all outputs of a layer, and the gradients of their sum."""

    def layer(u: jax.Array, weight: jax.Array, a: jax.Array) -> tuple[jax.Array, Any]:
        outputs = routing(form(u, weight), u, a)
        return jnp.sum(jnp.stack([jnp.sum(x) for x in jax.tree.leaves(outputs)])), outputs

    return jax.value_and_grad(layer, (0, 1, 2), has_aux=True)


def _count_temporaries(program: Any) -> float:
    """Returns MiB."""
    return program.memory_analysis().temp_size_in_bytes / 2**20

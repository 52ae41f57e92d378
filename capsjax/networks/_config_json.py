"""Configs as JSON: what a saved network stores of its sizes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from capsjax._routing import ROUTINGS
from capsjax.networks._network import NetworkConfig


def config_to_json(config: Any) -> dict[str, Any]:
    """Returns a config, or the routing in it, as its name and fields.

    Raises:
      TypeError: if it is that of an ensemble.
    """
    if isinstance(config, tuple):
        raise TypeError("an ensemble has no sizes of its own; the members are saved one by one")
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {"name": config.name, **{n: _to_json(value) for n, value in fields.items()}}


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return config_to_json(value) if dataclasses.is_dataclass(value) else value


def config_from_json(
    fields: Mapping[str, Any], networks: Mapping[str, type[NetworkConfig]]
) -> NetworkConfig:
    """Makes the config again.

    Args:
      fields: from `config_to_json`.
      networks: the kinds of config by name.

    Raises:
      ValueError: if no network or routing has the name, or a field does not fit.
    """
    return _build(fields, networks)


def _build(fields: Mapping[str, Any], kinds: Mapping[str, Any]) -> Any:
    try:
        name = fields["name"]
        kind = kinds[name]
    except KeyError as error:
        raise ValueError(
            f"expected one of {', '.join(kinds)}, got {error}; import the module that defines it "
            "and registers it in capsjax.NETWORKS or capsjax.ROUTINGS"
        ) from error
    try:
        return kind(**{n: _read(value) for n, value in fields.items() if n != "name"})
    except TypeError as error:
        raise ValueError(f"{name} has other fields: {error}") from error


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return _build(value, ROUTINGS)
    return tuple(map(_read, value)) if isinstance(value, list) else value


def with_routing(config: Any, name: str) -> Any:
    """Returns a config with the routing of that name; one that has it already keeps its fields.

    Raises:
      ValueError: if there is no such routing, or the network does not take it.
    """
    known = getattr(getattr(config, "routing", None), "name", None)
    if known is None:
        raise ValueError(f"--routing {name}: the network {config.name} takes no routing")
    if name not in ROUTINGS:
        raise ValueError(f"--routing is one of {', '.join(ROUTINGS)}, got {name!r}")
    if name == known:
        return config
    try:
        return dataclasses.replace(config, routing=ROUTINGS[name]())
    except ValueError as error:
        raise ValueError(
            f"--routing {name} does not route the capsules of the network {config.name}"
        ) from error


def with_iterations(config: Any, iterations: int) -> Any:
    """Returns a config whose routing has another number of iterations.

    Raises:
      ValueError: if its routing has no iterations.
    """
    routing: Any = getattr(config, "routing", None)
    if not hasattr(routing, "iterations"):
        lacks = (
            f"routing {routing.name} has no iterations"
            if routing
            else f"network {config.name} takes no routing"
        )
        raise ValueError(f"--routings {iterations}: the {lacks}; leave --routings out")
    return dataclasses.replace(config, routing=dataclasses.replace(routing, iterations=iterations))

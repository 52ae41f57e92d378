"""The path of another platform, taken by this CPU."""

import pytest
from jax import lax


def take_path(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes what is traced from now on choose its branch for a platform."""

    def choose(*operands, default, **others):
        return others.get(platform, default)(*operands)

    monkeypatch.setattr(lax, "platform_dependent", choose)

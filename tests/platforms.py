"""The path of another platform, taken by this CPU."""

import pytest
from jax import lax


def take_path(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets functions that are traced from now on choose what they have for a platform."""

    def choose(*operands, default, **others):
        return others.get(platform, default)(*operands)

    monkeypatch.setattr(lax, "platform_dependent", choose)

"""Plugins of which every number is known: nothing is found, softened or damped."""

from __future__ import annotations

from typing import Any

from rotate_ewc.integrations.avalanche import RotatedEWCPlugin


def exact_plugin(ewc_lambda: Any = 1.0, *args: Any, **options: Any) -> RotatedEWCPlugin:
    """Make a plugin of strength 1 with the Fisher matrix as it is, unless it is told otherwise."""
    return RotatedEWCPlugin(ewc_lambda, *args, **{"temperature": 1.0, "damping": 0.0, **options})

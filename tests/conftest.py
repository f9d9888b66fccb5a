"""Session-scoped tiny models, one per family."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def models():
    """Tiny models by family name, built once."""

    @functools.cache
    def build(name: str) -> Any:
        return tiny.FAMILIES[name].build()

    return build

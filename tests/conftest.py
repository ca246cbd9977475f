"""Shared fixtures."""

from __future__ import annotations

import engine.backend  # noqa: F401  (the fast BLAS must be loaded before anything imports MLX)

"""A plan as plain values: what `plan --json` prints, and what screens show without loading MLX themselves."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from engine.planner import Plan
from engine.planning.measure import Measured


def as_table(plan: Plan, measured: Measured | None = None) -> dict[str, Any]:
    """Sizes are bytes, times seconds, moments seconds since the epoch; None is unknown."""
    now, timing, capacity, known = time.time(), plan.timing, plan.capacity, bool(plan.components)
    tightest = plan.tightest if known else None
    table: dict[str, Any] = {
        "kind": plan.profile.kind,
        "parameters": plan.parameters if known else None,
        "device": capacity.device,
        "backward": plan.profile.train.backward,
        "micro_batch_size": plan.micro_batch_size,
        "accumulation": plan.accumulation,
        "predicted_peak_bytes": plan.predicted_peak_bytes if known else None,
        "need_bytes": plan.need_bytes if known else None,
        "components": dict(plan.components),
        "moment": plan.moment,
        "activations": {
            "without_gradient_checkpointing": plan.activation_bytes[False],
            "with_gradient_checkpointing": plan.activation_bytes[True],
            "gradient_checkpointing": plan.profile.train.gradient_checkpointing,
        },
        "limit_bytes": capacity.limit_bytes,
        "available_bytes": capacity.available_bytes,
        "device_bytes": capacity.device_bytes,
        "mlx_limit_bytes": capacity.mlx_limit_bytes,
        "processes": capacity.processes,
        "tightest": None if tightest is None else asdict(tightest),
        "verdict": "unknown" if plan.level is None else str(plan.level),
        "sentence": plan.verdict,
        "reason": plan.reason,
        "suggestions": [{**asdict(suggestion), "options": suggestion.options} for suggestion in plan.suggestions],
        "savings": [asdict(saving) for saving in plan.savings],
        "download_bytes": plan.download_bytes if known else None,
        "time": {
            "steps": timing.steps,
            "seconds_a_step": timing.seconds_a_step,
            "seconds": timing.seconds,
            "ends": None if timing.seconds is None else now + timing.seconds,
            "source": timing.source,
            "samples": timing.samples,
            "limit": timing.limit,
            "limit_at": timing.limit_at,
            "steps_within_limit": timing.steps_within(now),
        },
    }
    if measured is not None:
        table["measured_peak_bytes"] = measured.peak_bytes
        table["measured"] = asdict(measured)
    return table

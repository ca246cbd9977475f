"""What to run: the tables of a profile. Every field says what it means, its unit and its range."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from engine.profile_lora import Adapter, ChatData, PretrainedModel
from engine.profile_retention import RetentionModel, TextData
from engine.profile_section import Section, quantity


class Train(Section):
    """`[train]`: how long, how large a step, and how the optimizer moves."""

    steps: Annotated[int | None, quantity("length of the run", unit="steps", ge=1, le=10**12)] = None
    epochs: Annotated[float | None, quantity("length of the run", unit="passes over the data", gt=0)] = None
    tokens: Annotated[int | None, quantity("length of the run", unit="tokens", ge=1, le=10**18)] = None
    batch_size: Annotated[
        int, quantity("effective batch of a step, over all ranks", unit="sequences", ge=1, le=10**6)
    ] = 32
    micro_batch_size: Annotated[
        int | Literal["auto"] | None,
        quantity("sequences in memory at once on one rank; auto: what fits well; the whole batch if absent"),
    ] = None
    sequence_length: Annotated[int, quantity("length of a sequence", unit="tokens", ge=2, le=1_048_576)] = 256
    learning_rate: Annotated[float, quantity("peak of the schedule", gt=0, le=10)] = 1e-3
    final_learning_rate: Annotated[float, quantity("end of the schedule", ge=0, le=10)] = 0.0
    warmup_steps: Annotated[int, quantity("linear rise from zero", unit="steps", ge=0)] = 0
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "exponential", "step"], quantity("course after the warm-up")
    ] = "cosine"
    decay_rate: Annotated[
        float, quantity("the schedules exponential (each step) and step multiply the learning rate with it", gt=0, le=1)
    ] = 0.9
    decay_steps: Annotated[int, quantity("how often the schedule step does", unit="steps", ge=1)] = 100
    optimizer: Annotated[
        Literal["adamw", "adam", "sgd", "muon", "adafactor", "lion"],
        quantity("what makes an update of a gradient; betas are those of the Adams and of Lion"),
    ] = "adamw"
    momentum: Annotated[float, quantity("of SGD and Muon", ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, quantity("AdamW's decoupled decay, on matrices only", ge=0, le=10)] = 0.1
    beta1: Annotated[float, quantity("AdamW's decay of the gradient's mean", ge=0, lt=1)] = 0.9
    beta2: Annotated[float, quantity("AdamW's decay of the gradient's square", ge=0, lt=1)] = 0.95
    clip_norm: Annotated[float | None, quantity("largest global gradient norm; no clipping if 0", ge=0)] = 1.0
    gradient_checkpointing: Annotated[bool, quantity("recompute each layer in the backward pass to save memory")] = (
        False
    )
    backward: Annotated[
        Literal["whole", "layerwise", "auto"],
        quantity(
            "whole: one graph, the fastest; layerwise: layer by layer, the least memory; auto: whole where it fits"
        ),
    ] = "whole"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        quantity("of the computation; weights are kept in float32. auto: float32 on CPU, bfloat16 on GPU"),
    ] = "auto"

    @field_validator("micro_batch_size", mode="before")
    @classmethod
    def _is_a_size(cls, value: Any) -> Any:
        if value not in (None, "auto") and not (isinstance(value, int) and value >= 1):
            raise ValueError('should be a whole number of at least 1, or "auto"')
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        lengths = [name for name in ("steps", "epochs", "tokens") if getattr(self, name) is not None]
        if len(lengths) != 1:
            raise ValueError(
                "needs exactly one of steps, epochs and tokens" + (f", has {', '.join(lengths)}" if lengths else "")
            )
        if self.at_once is not None and self.at_once > self.batch_size:
            raise ValueError(f"micro_batch_size = {self.at_once} is larger than batch_size = {self.batch_size}")
        if self.final_learning_rate > self.learning_rate:
            raise ValueError("final_learning_rate is larger than learning_rate")
        return self

    @property
    def at_once(self) -> int | None:
        """`micro_batch_size` where it is a number."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else None


class LoRATrain(Train):
    """`[train]` of a fine-tuning: other defaults."""

    micro_batch_size: Annotated[
        int | Literal["auto"] | None,
        quantity("sequences in memory at once on one rank; auto: what fits well; the whole batch if absent"),
    ] = "auto"
    batch_size: Annotated[
        int, quantity("effective batch of a step, over all ranks", unit="sequences", ge=1, le=10**6)
    ] = 16
    sequence_length: Annotated[
        int, quantity("longest sequence; longer rows are truncated, and counted", unit="tokens", ge=2, le=1_048_576)
    ] = 2048
    learning_rate: Annotated[float, quantity("peak of the schedule", gt=0, le=10)] = 1e-4
    weight_decay: Annotated[float, quantity("AdamW's decoupled decay, on matrices only", ge=0, le=10)] = 0.01
    beta2: Annotated[float, quantity("AdamW's decay of the gradient's square", ge=0, lt=1)] = 0.999
    gradient_checkpointing: Annotated[bool, quantity("recompute each layer in the backward pass to save memory")] = True
    backward: Annotated[
        Literal["whole", "layerwise", "auto"],
        quantity(
            "whole: one graph, the fastest; layerwise: layer by layer, the least memory; auto: whole where it fits"
        ),
    ] = "auto"


class Validate(Section):
    """`[validate]`: when the held-out text is measured."""

    every: Annotated[int, quantity("distance between validations; 0: only at the end", unit="steps", ge=0)] = 100
    batches: Annotated[int, quantity("micro-batches a validation; 0: all of the held-out text", ge=0)] = 0


class Checkpoint(Section):
    """`[checkpoint]`: when the run is saved and how many checkpoints stay."""

    every: Annotated[int, quantity("distance between checkpoints; 0: by time only", unit="steps", ge=0)] = 500
    every_minutes: Annotated[
        float, quantity("longest time without a checkpoint; 0: by steps only", unit="minutes", ge=0)
    ] = 30
    keep: Annotated[int, quantity("the newest checkpoints that stay; the best always does", ge=1)] = 3


class MemoryGuard(Section):
    """`[guard.memory]`: what is done when the machine runs short of memory."""

    on_red: Annotated[
        Literal["pause", "stop", "off"],
        quantity("red pressure: checkpoint and pause until it is green, or checkpoint and stop with exit code 3"),
    ] = "pause"
    shrink: Annotated[
        bool, quantity("yellow pressure, or no memory left: halve the micro-batch; the effective batch stays")
    ] = True
    yellow_seconds: Annotated[
        float, quantity("yellow for so long: clear the cache, and after as long again shrink", unit="seconds", ge=0)
    ] = 10
    red_seconds: Annotated[float, quantity("red for so long: act", unit="seconds", ge=0)] = 3
    green_seconds: Annotated[float, quantity("green for so long: go on after a pause", unit="seconds", ge=0)] = 60
    limit_gb: Annotated[
        float | None,
        quantity("most that MLX may hold, cache included; its own limit if absent", unit="10⁹ bytes", gt=0, le=1e6),
    ] = None
    swap_mb: Annotated[float, quantity("swap above this and growing is an alarm; 0: never", unit="10⁶ bytes", ge=0)] = (
        500
    )
    leak_hours: Annotated[
        float,
        quantity(
            "memory whose floor rises so that it meets the limit within this time is an alarm", unit="hours", ge=0
        ),
    ] = 24


class DivergenceGuard(Section):
    """`[guard.divergence]`: what is done with a step that is no good. NaN and infinity are never applied."""

    loss_sigma: Annotated[
        float, quantity("a loss so many standard deviations over the mean of the window is a spike; 0: never", ge=0)
    ] = 6
    grad_norm_factor: Annotated[
        float, quantity("a grad norm so many times the median of the window is a spike; 0: never", ge=0)
    ] = 1000
    window_steps: Annotated[int, quantity("the last steps that a spike is measured by", unit="steps", ge=16)] = 128
    skips: Annotated[
        int, quantity("bad steps in a row that are skipped; the next one goes back, or stops", unit="steps", ge=0)
    ] = 2
    rollbacks: Annotated[
        int, quantity("how often a run goes back to its last good checkpoint before it stops with exit code 4", ge=0)
    ] = 2
    rollback_learning_rate: Annotated[
        float, quantity("what the learning rate is multiplied with each time it goes back", gt=0, le=1)
    ] = 0.5


class EarlyStopping(Section):
    """`[guard.early_stopping]`: what is done when the held-out loss has had enough."""

    patience: Annotated[
        int, quantity("stop after so many validations without a better held-out loss; 0: never", ge=0)
    ] = 0
    least_improvement: Annotated[float, quantity("how much better counts as better", unit="nats", ge=0)] = 0.0
    on_overfitting: Annotated[
        Literal["alarm", "stop", "off"],
        quantity("held-out loss rises while the training loss falls, three validations in a row"),
    ] = "alarm"


class Guard(Section):
    """`[guard]`: what ends or changes a run before its time."""

    memory: MemoryGuard = MemoryGuard()
    divergence: DivergenceGuard = DivergenceGuard()
    early_stopping: EarlyStopping = EarlyStopping()
    stop_at: Annotated[str | None, quantity("checkpoint and stop at this time of day, e.g. 07:00")] = None
    max_hours: Annotated[
        float | None, quantity("checkpoint and stop after so long, pauses included", unit="hours", gt=0, le=8784)
    ] = None
    hang_seconds: Annotated[float, quantity("the shortest silence that may be one", unit="seconds", gt=0)] = 30
    hang_factor: Annotated[
        float, quantity("no progress in so many times the median step is an alarm; 0: never", ge=0)
    ] = 20

    @field_validator("stop_at")
    @classmethod
    def _is_a_time(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"([01]?\d|2[0-3]):[0-5]\d", value, re.ASCII):
            raise ValueError("should be a time of day like 07:00")
        return value

    @model_validator(mode="before")
    @classmethod
    def _before_there_were_tables(cls, value: Any) -> Any:
        # Runs of the first release have `nan_steps`: steps in a row until the stop, the last one counted.
        if isinstance(value, dict) and isinstance(value.get("nan_steps"), int) and "divergence" not in value:
            rest = {key: entry for key, entry in value.items() if key != "nan_steps"}
            return {**rest, "divergence": {"skips": max(0, value["nan_steps"] - 1), "rollbacks": 0}}
        return value


class Host(Section):
    """`[host]`: what the machine is asked for while the run trains."""

    keep_awake: Annotated[bool, quantity("keep the system from sleeping; its display may")] = True
    display_sleep: Annotated[
        bool, quantity("with keep_awake: put the display to sleep when the run starts (macOS)")
    ] = False
    relax_metal_watchdog: Annotated[
        bool, quantity("set AGX_RELAX_CDM_CTXSTORE_TIMEOUT, for long kernels on macOS; before MLX is loaded")
    ] = False
    buffer_mb: Annotated[
        int | None,
        quantity(
            "MLX_MAX_MB_PER_BUFFER: smaller command buffers take less memory; if absent 64 on CUDA, else MLX's own",
            unit="MB",
            ge=1,
        ),
    ] = None


class Profile(Section):
    """A whole run. The kind decides which file of engine/tasks/ runs it."""

    kind: Annotated[str, quantity("what is trained")]
    description: Annotated[str, quantity("one line that says what it is for")] = ""
    seed: Annotated[int, quantity("of weights, order of data and dropout", ge=0, lt=2**31)] = 0
    train: Train
    validation: Annotated[Validate, Field(alias="validate")] = Validate()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    host: Host = Host()

    @field_validator("kind", mode="before")
    @classmethod
    def _is_known(cls, value: Any) -> Any:
        if not isinstance(value, str) or value not in KINDS:
            raise ValueError(f"should be {' or '.join(map(repr, KINDS))}")
        return value


class RetentionProfile(Profile):
    """Pretraining of a power-retention language model."""

    kind: Annotated[Literal["retention-lm"], quantity("what is trained")]
    model: RetentionModel = RetentionModel()
    data: TextData


class LoRAProfile(Profile):
    """Fine-tuning of a pretrained language model."""

    kind: Annotated[Literal["lora"], quantity("what is trained")]
    model: PretrainedModel
    adapter: Adapter = Adapter()
    data: ChatData
    train: LoRATrain


KINDS: Mapping[str, type[Profile]] = {"retention-lm": RetentionProfile, "lora": LoRAProfile}


def profile_class(table: Mapping[str, Any]) -> type[Profile]:
    """The kind of profile that a table is; one of the first kind where it names none that is known."""
    return KINDS.get(str(table.get("kind")), RetentionProfile)


def parse_profile(table: Mapping[str, Any]) -> Profile:
    """The profile in a plain table. Raises pydantic's `ValidationError`."""
    return profile_class(table).model_validate(table)

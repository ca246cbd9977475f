"""What to run: the tables of a profile. Every field says what it means, its unit and its range."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


def quantity(description: str, *, unit: str = "", **bounds: Any) -> Any:
    """A field's description, unit and range (`ge`, `gt`, `le`, `lt` as in pydantic)."""
    return Field(description=description, json_schema_extra={"unit": unit} if unit else None, **bounds)


class Section(BaseModel):
    """A table of a profile: frozen, and closed to names that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python takes true for 1, so `steps = true` would be a run of one step.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("should not be true or false")
        return value


class RetentionModel(Section):
    """`[model]` of a power-retention language model."""

    init_from: Annotated[
        str | None, quantity("start from the weights of this run, checkpoint or folder instead of random ones")
    ] = None
    width: Annotated[int, quantity("size of the residual stream", ge=8, le=16384)] = 256
    layers: Annotated[int, quantity("number of blocks", ge=1, le=200)] = 6
    heads: Annotated[int, quantity("query heads; width / heads is the head size", ge=1, le=256)] = 8
    kv_heads: Annotated[int | None, quantity("key and value heads; as many as query heads if absent", ge=1)] = None
    hidden: Annotated[
        int | None, quantity("inner size of the SwiGLU; 8/3 of the width, rounded up to 64, if absent", ge=8)
    ] = None
    vocab_size: Annotated[int, quantity("rows of the (tied) embedding", unit="tokens", ge=257, le=1_000_000)] = 50_257
    power: Annotated[Literal[1, 2, 4], quantity("exponent of the query-key product")] = 2
    chunk_size: Annotated[int, quantity("length of a chunk of the chunked form", unit="tokens", ge=16, le=4096)] = 128
    switch_over: Annotated[
        int, quantity("up to this length the attention form is used, beyond it the chunked one", unit="tokens", ge=0)
    ] = 1024
    rope_theta: Annotated[float, quantity("base of the rotary position embedding", gt=1)] = 10_000.0

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}")
        if self.power == 4 and self.width // self.heads > 16:
            raise ValueError(
                f"power = 4 needs width / heads of at most 16, not {self.width // self.heads}, to generate"
            )
        if (self.width // self.heads) % 2:
            raise ValueError(
                f"width / heads = {self.width // self.heads} is odd; rotary positions need an even head size"
            )
        return self


class TextData(Section):
    """`[data]` of a language model: one source of text, and how it is split and tokenized."""

    builtin: Annotated[
        Literal["python-docs"] | None,
        quantity("text that needs no download: the language reference and docstrings that every Python carries"),
    ] = None
    files: Annotated[
        list[str],
        quantity("text files, .jsonl files with a key `text`, or folders of both; relative to the profile"),
    ] = []
    heldout_files: Annotated[list[str], quantity("held-out text as files of its own, instead of a split")] = []
    split: Annotated[
        Literal["document", "tail"],
        quantity("hold out whole documents (chosen by the seed) or the tail of the text; of one document, its tail"),
    ] = "document"
    heldout_fraction: Annotated[float, quantity("share of the text that is held out", gt=0, lt=1)] = 0.1
    tokenizer: Annotated[
        str,
        quantity("`bpe` trains a byte-level BPE on the text; otherwise a Hugging Face tokenizer folder"),
    ] = "bpe"

    @field_validator("files", "heldout_files", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.builtin) == bool(self.files):
            raise ValueError("needs exactly one of builtin and files")
        if self.builtin and self.heldout_files:
            raise ValueError(f'builtin = "{self.builtin}" brings its own held-out text; leave heldout_files out')
        return self


class Train(Section):
    """`[train]`: how long, how large a step, and how the optimizer moves."""

    steps: Annotated[int | None, quantity("length of the run", unit="steps", ge=1, le=10**12)] = None
    epochs: Annotated[float | None, quantity("length of the run", unit="passes over the data", gt=0)] = None
    tokens: Annotated[int | None, quantity("length of the run", unit="tokens", ge=1, le=10**18)] = None
    batch_size: Annotated[
        int, quantity("effective batch of a step, over all ranks", unit="sequences", ge=1, le=10**6)
    ] = 32
    micro_batch_size: Annotated[
        int | None, quantity("sequences in memory at once on one rank; the whole batch if absent", ge=1)
    ] = None
    sequence_length: Annotated[int, quantity("length of a sequence", unit="tokens", ge=2, le=1_048_576)] = 256
    learning_rate: Annotated[float, quantity("peak of the schedule", gt=0, le=10)] = 1e-3
    final_learning_rate: Annotated[float, quantity("end of the schedule", ge=0, le=10)] = 0.0
    warmup_steps: Annotated[int, quantity("linear rise from zero", unit="steps", ge=0)] = 0
    schedule: Annotated[Literal["cosine", "linear", "constant"], quantity("course after the warm-up")] = "cosine"
    weight_decay: Annotated[float, quantity("AdamW's decoupled decay, on matrices only", ge=0, le=10)] = 0.1
    beta1: Annotated[float, quantity("AdamW's decay of the gradient's mean", ge=0, lt=1)] = 0.9
    beta2: Annotated[float, quantity("AdamW's decay of the gradient's square", ge=0, lt=1)] = 0.95
    clip_norm: Annotated[float | None, quantity("largest global gradient norm; no clipping if 0", ge=0)] = 1.0
    gradient_checkpointing: Annotated[bool, quantity("recompute each layer in the backward pass to save memory")] = (
        False
    )
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        quantity("of the computation; weights are kept in float32. auto: float32 on CPU, bfloat16 on GPU"),
    ] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        lengths = [name for name in ("steps", "epochs", "tokens") if getattr(self, name) is not None]
        if len(lengths) != 1:
            raise ValueError(
                "needs exactly one of steps, epochs and tokens" + (f", has {', '.join(lengths)}" if lengths else "")
            )
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size} is larger than batch_size = {self.batch_size}"
            )
        if self.final_learning_rate > self.learning_rate:
            raise ValueError("final_learning_rate is larger than learning_rate")
        return self


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

    kind: Annotated[Literal["retention-lm"], quantity("what is trained")]
    description: Annotated[str, quantity("one line that says what it is for")] = ""
    seed: Annotated[int, quantity("of weights, order of data and dropout", ge=0, lt=2**31)] = 0
    model: RetentionModel = RetentionModel()
    data: TextData
    train: Train
    validation: Annotated[Validate, Field(alias="validate")] = Validate()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    host: Host = Host()

"""What to run: a profile is a TOML file, validated here; every field says what it means, its unit and its range."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails

from engine.errors import UserError


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

    steps: Annotated[int | None, quantity("length of the run", unit="steps", ge=1)] = None
    epochs: Annotated[float | None, quantity("length of the run", unit="passes over the data", gt=0)] = None
    tokens: Annotated[int | None, quantity("length of the run", unit="tokens", ge=1)] = None
    batch_size: Annotated[int, quantity("effective batch of a step, over all ranks", unit="sequences", ge=1)] = 32
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


class Guard(Section):
    """`[guard]`: what ends a run before its time."""

    nan_steps: Annotated[
        int, quantity("steps in a row without a finite loss or gradient before the run stops; none is applied", ge=1)
    ] = 3


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


@dataclass(frozen=True)
class ProfileFile:
    """A profile that can be chosen by name, not yet validated."""

    name: str
    path: Path
    kind: str
    description: str
    own: bool
    """True for a profile from the user's own folder."""


def shipped_folder() -> Path:
    """The profiles of this release: inside the package when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "profiles"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "profiles"


def own_folder() -> Path:
    """The user's own profiles (`$RETENTION_TUI_PROFILES` or the platform's configuration folder)."""
    override = os.environ.get("RETENTION_TUI_PROFILES")
    return Path(override) if override else platformdirs.user_config_path("retention-tui") / "profiles"


def list_profiles() -> list[ProfileFile]:
    """All profiles that can be named, the user's own last; one with a shipped name replaces the shipped one."""
    found: dict[str, ProfileFile] = {}
    for folder, own in ((shipped_folder(), False), (own_folder(), True)):
        for path in sorted(folder.glob("*.toml")):
            try:
                table = _read_profile(path)
            except UserError as error:
                table = {"kind": "?", "description": str(error)}
            kind, description = str(table.get("kind", "?")), str(table.get("description", ""))
            found[path.stem] = ProfileFile(path.stem, path, kind, description, own)
    return list(found.values())


def find_profile(name_or_path: str) -> Path:
    """The file of a profile given by name or by path.

    Raises `UserError` naming the nearest profile where there is none.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml" or os.sep in name_or_path:
        if not path.is_file():
            raise UserError(f"profile {name_or_path}: no such file")
        return path
    profiles = {profile.name: profile.path for profile in list_profiles()}
    if name_or_path not in profiles:
        raise UserError(f"profile {name_or_path!r} is not known; {_nearest(name_or_path, profiles)}")
    return profiles[name_or_path]


def load_profile(name_or_path: str, overrides: Iterable[str] = ()) -> Profile:
    """Reads, extends, overrides (`train.steps=50`) and validates a profile.

    File paths come back absolute: those of a profile are relative to its folder, those of an override to the current
    one. What excludes another (`steps`, `epochs`, `tokens`; `builtin`, `files`) takes its place when it comes later.

    Raises `UserError` with one line: the file, the key, what is wrong and what would be right.
    """
    path = find_profile(name_or_path)
    table = _read_profile(path)
    for override in overrides:
        table = _merge(table, _parse_override(override))
    return validate_profile(table, where=path.name)


def validate_profile(table: Mapping[str, Any], where: str) -> Profile:
    """The profile in a plain table, as TOML or run.json gives it; `where` is named in the error."""
    try:
        return Profile.model_validate(table)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{where}: {_describe(problems[0])}{more}") from None


def _read_profile(path: Path) -> dict[str, Any]:
    table = _read_table(path)
    base_name = table.pop("extends", None)
    if base_name is None:
        return table
    base_path = _find_base(str(base_name), path)
    base = _read_table(base_path)
    if "extends" in base:
        raise UserError(f"{path.name}: extends {base_name!r}, which extends another; one level is the most")
    return _merge(base, table)


def _find_base(name: str, path: Path) -> Path:
    # A user's own profile may carry the name of the shipped one that it extends.
    for folder in (path.parent, own_folder(), shipped_folder()):
        candidate = folder / f"{name}.toml"
        if candidate.is_file() and not candidate.samefile(path):
            return candidate
    known = {profile.name for profile in list_profiles()} - {path.stem}
    raise UserError(f"{path.name}: extends {name!r}, which is not known; {_nearest(name, known)}")


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"profile {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"profile {path}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"profile {path}: not valid TOML: {error}") from None
    return _with_absolute_paths(table, path.parent)


_ALTERNATIVES = {"train": ("steps", "epochs", "tokens"), "data": ("builtin", "files")}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        if isinstance(value, dict) and isinstance(inner, dict):
            alternatives = _ALTERNATIVES.get(key, ())
            if not value.keys().isdisjoint(alternatives):
                inner = {name: old for name, old in inner.items() if name not in alternatives}
            merged[key] = _merge(inner, value)
        else:
            merged[key] = value
    return merged


def _parse_override(override: str) -> dict[str, Any]:
    """`train.steps=50` as a table; the value is TOML, or a plain string where it is not valid TOML."""
    key, separator, text = override.partition("=")
    *sections, name = (part.strip() for part in key.split("."))
    if not separator or not all([*sections, name]):
        raise UserError(f"--set {override}: give it as KEY=VALUE, for example train.steps=50")
    table: dict[str, Any] = {name: _parse_value(text.strip())}
    for section in reversed(sections):
        table = {section: table}
    return _with_absolute_paths(table, Path.cwd())


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _with_absolute_paths(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The table with its file names made absolute; what is not a file name is left for the validation to refuse."""

    def absolute(name: Any) -> Any:
        return str((folder / Path(name).expanduser()).resolve()) if isinstance(name, str) else name

    resolved = dict(table)
    if isinstance(data := table.get("data"), dict):
        resolved["data"] = data = dict(data)
        for key in ("files", "heldout_files"):
            if key in data:
                data[key] = (
                    [absolute(name) for name in data[key]] if isinstance(data[key], list) else absolute(data[key])
                )
        if data.get("tokenizer", "bpe") != "bpe":
            data["tokenizer"] = absolute(data["tokenizer"])
    if isinstance(model := table.get("model"), dict) and str(model.get("init_from", "")).startswith((".", "~")):
        resolved["model"] = {**model, "init_from": absolute(model["init_from"])}  # anything else may name a run
    return resolved


_ALIKE = 0.6


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=_ALIKE)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"


def _describe(problem: ErrorDetails) -> str:
    location = problem["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    if problem["type"] == "extra_forbidden":
        return f"{key} is not known; {_nearest_key(location)}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    value = problem["input"]
    shown = "" if isinstance(value, dict | BaseModel) else f" = {_as_toml(value)}"
    return f"{key}{shown}: {_in_words(problem)}"


_KINDS_OF_VALUE = {
    "model_type": "a table",
    "model_attributes_type": "a table",
    "list_type": "a list",
    "string_type": "a string",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}


def _in_words(problem: ErrorDetails) -> str:
    if problem["type"] in _KINDS_OF_VALUE:
        return f"should be {_KINDS_OF_VALUE[problem['type']]}"
    return problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")


def _as_toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _nearest_key(location: tuple[int | str, ...]) -> str:
    """Where an unknown key probably belongs: a name beside it, or the same name in another table."""
    name, siblings = str(location[-1]), _names_at(location[:-1])
    if not difflib.get_close_matches(name, siblings, n=1, cutoff=_ALIKE):
        for section in _names_at(()):
            if name in _names_at((section,)):
                return f"did you mean '{section}.{name}'?"
    return _nearest(name, siblings)


def _names_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Profile
    for part in location:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        model = fields[str(part)].annotation
    return [field.alias or name for name, field in getattr(model, "model_fields", {}).items()]

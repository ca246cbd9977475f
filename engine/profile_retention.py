"""The tables of a profile that pretrains a power-retention language model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import field_validator, model_validator

from engine.profile_section import Section, quantity


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

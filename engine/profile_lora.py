"""The tables of a profile that fine-tunes a pretrained language model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import field_validator, model_validator

from engine.profile_section import Section, quantity


class PretrainedModel(Section):
    """`[model]` of a fine-tuning: the base that is learned on top of."""

    init_from: Annotated[
        str | None,
        quantity("the base: a folder with config.json and safetensors, or a name on the Hugging Face hub"),
    ] = None
    builtin: Annotated[
        Literal["python-docs"] | None,
        quantity("a base that needs no download: a small Llama, pretrained here on Python's documentation"),
    ] = None
    revision: Annotated[str | None, quantity("branch, tag or commit of the name on the hub")] = None
    quantize_bits: Annotated[
        Literal[4, 8] | None,
        quantity("quantize the base when it is loaded (QLoRA), unless it is quantized already"),
    ] = None
    quantize_group_size: Annotated[Literal[32, 64, 128], quantity("numbers that share a scale and a bias")] = 64
    trust_remote_code: Annotated[
        bool, quantity("let the tokenizer run code that came with the download: only for what you trust")
    ] = False

    @model_validator(mode="after")
    def _one_base(self) -> Self:
        if bool(self.init_from) == bool(self.builtin):
            raise ValueError("needs exactly one of init_from and builtin")
        return self


class Adapter(Section):
    """`[adapter]`: what is learned."""

    method: Annotated[
        Literal["lora", "dora", "full"],
        quantity("low-rank updates (arXiv 2106.09685), with their magnitude apart (arXiv 2402.09353), or all weights"),
    ] = "lora"
    rank: Annotated[int, quantity("columns of A and rows of B: how much can be learned", ge=1, le=4096)] = 16
    alpha: Annotated[float, quantity("updates are scaled by alpha / rank", gt=0, le=1e6)] = 32
    dropout: Annotated[float, quantity("of what goes into A, while it trains", ge=0, lt=1)] = 0.0
    targets: Annotated[
        list[str],
        quantity("modules of each layer that learn, by the last parts of their names; `all` is every linear one"),
    ] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers: Annotated[int | None, quantity("how many of the last layers learn; all if absent", ge=1)] = None
    init_from: Annotated[
        str | None, quantity("go on from the adapter of this run, or of a folder that mlx-lm or retention-tui wrote")
    ] = None

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied with, as mlx-lm names it."""
        return self.alpha / self.rank

    @field_validator("targets", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _something_learns(self) -> Self:
        if not self.targets:
            raise ValueError("targets is empty: nothing would learn")
        return self


class ChatData(Section):
    """`[data]` of a fine-tuning: rows of text, of messages, or of prompts and completions."""

    builtin: Annotated[
        Literal["python-docs"] | None,
        quantity("questions about Python that need no download, all answered in one style"),
    ] = None
    files: Annotated[
        list[str],
        quantity(".jsonl or .parquet files, or folders with train.jsonl and valid.jsonl; relative to the profile"),
    ] = []
    dataset: Annotated[str | None, quantity("a data set's name on the Hugging Face hub")] = None
    dataset_config: Annotated[str, quantity("which of its configurations")] = "default"
    split: Annotated[str, quantity("which of its splits is trained on")] = "train"
    heldout_split: Annotated[str | None, quantity("which of its splits is held out, instead of some rows")] = None
    heldout_files: Annotated[list[str], quantity("held-out rows as files of their own, instead of some rows")] = []
    heldout_fraction: Annotated[float, quantity("share of the rows that is held out", gt=0, lt=1)] = 0.05
    most_rows: Annotated[int | None, quantity("take only so many rows, chosen by the seed", unit="rows", ge=2)] = None
    format: Annotated[
        Literal["auto", "text", "messages", "completion", "alpaca", "llama2", "oasst", "sharegpt"],
        quantity("what a row is; auto: what its keys say"),
    ] = "auto"
    text_key: Annotated[str, quantity("key of a row's text")] = "text"
    messages_key: Annotated[str, quantity("key of a row's messages; tools beside it are given to the template")] = (
        "messages"
    )
    prompt_key: Annotated[str, quantity("key of a row's prompt")] = "prompt"
    completion_key: Annotated[str, quantity("key of a row's completion")] = "completion"
    loss_on: Annotated[
        Literal["all", "answers", "last-answer"],
        quantity("which tokens are learned: all, those of every answer, or those of the last one alone"),
    ] = "all"
    answer_after: Annotated[
        str | None, quantity("in rows of plain text the answer is what follows this, for loss_on = answers")
    ] = None
    chat_template: Annotated[
        str | None, quantity("a file with a Jinja template, for a tokenizer that brings none; relative to the profile")
    ] = None

    @field_validator("files", "heldout_files", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(map(bool, (self.builtin, self.files, self.dataset))) != 1:
            raise ValueError("needs exactly one of builtin, files and dataset")
        if self.heldout_split and not self.dataset:
            raise ValueError("heldout_split is of a dataset; heldout_files goes with files")
        if self.loss_on != "all" and self.format == "text" and not self.answer_after:
            raise ValueError(f'loss_on = "{self.loss_on}" in plain text needs answer_after')
        return self

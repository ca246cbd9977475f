"""What makes a run of each kind what it is, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.errors import UserError
from engine.profile import LoRAProfile, Profile, RetentionProfile
from engine.profile_files import validate_profile
from engine.report import Change
from retention_tui import wording

Fact = tuple[str, str]
"""A name and what is said of it."""

_METHODS = {"lora": "LoRA", "dora": "DoRA", "full": "all weights are trained"}


def kind_facts(profile: Profile) -> list[Fact]:
    """What is trained, and on what."""
    match profile:
        case RetentionProfile(model=model, data=data):
            return [
                ("width", f"{model.width:,}"),
                ("layers", f"{model.layers}"),
                ("heads", f"{model.heads} of {model.width // model.heads}"),
                ("vocabulary", f"{model.vocab_size:,}"),
                ("text", data.builtin or _last_parts(data.files)),
            ]
        case LoRAProfile(model=base, adapter=adapter, data=rows):
            scale = f"alpha {adapter.alpha:g} (scale {adapter.scale:g})"
            learned = f"rank {adapter.rank}, {scale}, dropout {adapter.dropout:g}"
            source = "questions about Python" if rows.builtin else rows.dataset or _last_parts(rows.files)
            return [
                ("base", base.init_from or "a small Llama that is pretrained here"),
                *([("quantized", f"to {base.quantize_bits} bits when loaded")] if base.quantize_bits else []),
                ("method", _METHODS[adapter.method]),
                *([("adapter", learned), ("targets", _modules(adapter.targets))] if adapter.method != "full" else []),
                ("rows", f"{source}, loss on {rows.loss_on.replace('last-answer', 'the last answer')}"),
            ]
    return []


def run_facts(settings: Mapping[str, Any], changes: Iterable[Change]) -> list[Fact]:
    """What a run trains, by the profile that it began with, and what was changed in it since."""
    try:
        facts = kind_facts(validate_profile(dict(settings), where="run.json"))
    except UserError:  # of another release
        facts = []
    changed = [f"{change.key} = {change.value} after step {change.from_step:,}" for change in changes]
    return [*facts, *(("changed" if index == 0 else "", said) for index, said in enumerate(changed))]


def parameters(count: int, trained: int | None) -> str:
    """`0.9 M parameters`, or `37 M of 1.6 B parameters trained`; `trained` is None where that is not known."""
    said = f"{wording.thousands(count)} parameters"
    return said if trained in (None, count) else f"{wording.thousands(trained)} of {said} trained"


def _modules(names: Sequence[str]) -> str:
    """`q, k, v, o projections`."""
    short = [name.removesuffix("_proj") for name in names]
    return f"{', '.join(short)} projections" if all(name.endswith("_proj") for name in names) else ", ".join(names)


def _last_parts(names: Iterable[str]) -> str:
    return ", ".join(name.rpartition("/")[2] for name in names)

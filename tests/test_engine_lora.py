"""A fine-tuning as a whole: against mlx-lm's own trainer, killed and gone on with, and refused before it begins."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ride import Ride, losses
from tiny_llama import tiny_row, write_rows, write_tiny_llama

from engine.backend import mx
from engine.checkpoint import choose_checkpoint, list_checkpoints
from engine.commands import Checkpoint, Generate, Pause, Stop
from engine.environment import environment
from engine.errors import UserError
from engine.events import AnswerEnded, AnswerText, Notice, State, StateChanged, StepCompleted
from engine.models.adapters import adapter_config, attach, save_adapter
from engine.models.pretrained import instantiate
from engine.optimizer import learning_rate
from engine.profile import LoRAProfile, parse_profile
from engine.profile_lora import Adapter
from engine.runs import create_run
from engine.store import RunDirectory
from engine.tasks import make_task
from engine.worker import Engine

import mlx.optimizers as optim
from mlx_lm import generate, load
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

LENGTH = 40
PANELS = ("adapter", "base")
TRAIN = """
import os, signal, sys
from pathlib import Path
from engine.planner import profile_of
from engine.saving import Saver
from engine.store import RunDirectory
from engine.worker import Engine
save = Saver.save
def save_and_die(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
Saver.save = save_and_die
run = RunDirectory(Path(sys.argv[1]))
engine = Engine(run, profile_of(run))
engine.start()
engine.join()
"""
"""A process that trains and is killed once a checkpoint is written."""
RideOf = Callable[..., Ride]


def profile_of(base: Path, rows: Path, **sections: Any) -> LoRAProfile:
    table: dict[str, Any] = {
        "kind": "lora",
        "model": {"init_from": str(base), **sections.get("model", {})},
        "adapter": {"rank": 4, "alpha": 8, **sections.get("adapter", {})},
        "data": {"files": [str(rows)], **sections.get("data", {})},
        "train": {
            "steps": 6,
            "batch_size": 4,
            "micro_batch_size": 2,
            "sequence_length": LENGTH,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "backward": "whole",
            **sections.get("train", {}),
        },
        "validate": {"every": 0, **sections.get("validate", {})},
        "checkpoint": {"every": 3, **sections.get("checkpoint", {})},
        "host": {"keep_awake": False},
    }
    made = parse_profile(table)
    assert isinstance(made, LoRAProfile)
    return made


def long_rows(folder: Path, count: int) -> Path:
    """Rows of plain text that are all longer than a sequence: so all are cut to one length."""
    folder.mkdir()
    path = folder / "train.jsonl"
    texts = (" ".join(tiny_row(index + other, "text")["text"] for other in range(4)) for index in range(count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("backward", ["whole", "layerwise"])
def test_every_loss_is_mlx_lms(backward: str, tmp_path: Path, ride: RideOf) -> None:
    """The same base, adapter, rows, order and settings in its `train`, which compiles; ours does not on a CPU."""
    base = write_tiny_llama(tmp_path / "base", model_type="qwen2")
    settings = {"backward": backward, "clip_norm": 0, "schedule": "constant", "weight_decay": 0.1}
    profile = profile_of(base, long_rows(tmp_path / "rows", 40), train=settings)
    run = ride(profile)
    assert run.end().exit_code == 0, run.events[-1]

    task = make_task(profile, tmp_path)
    parts = [
        task.batch(examples[start : start + 2])
        for examples in (task.examples(step, 0, 1) for step in range(1, 7))
        for start in (0, 2)
    ]
    model, _ = load(str(base))
    model.freeze()
    keys = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys})
    model.update(task.initial_parameters())
    theirs: list[float] = []

    class Listen(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            theirs.append(train_info["train_loss"])

    def batches(**_: Any) -> Any:
        for part in parts:
            assert part.arrays[0].shape == (2, LENGTH + 1)
            yield part.arrays[0], mx.array([[0, LENGTH]] * 2)  # its lengths count from the first target

    optimizer = optim.AdamW(
        lambda step: mx.array([learning_rate(profile.train, index, 6) for index in range(1, 8)])[step],
        betas=[profile.train.beta1, profile.train.beta2],
        weight_decay=0.1,
        bias_correction=True,
    )
    arguments = TrainingArgs(
        batch_size=2,
        iters=len(parts),
        steps_per_report=1,
        steps_per_save=10**6,
        max_seq_length=LENGTH + 1,
        adapter_file=str(tmp_path / "theirs.safetensors"),
        grad_accumulation_steps=2,
    )
    mx.disable_compile()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train(model, optimizer, [], None, arguments, iterate_batches=batches, training_callback=Listen())
    finally:
        mx.enable_compile()
    steps = [(one + other) / 2 for one, other in zip(theirs[::2], theirs[1::2], strict=True)]
    assert losses(run.run) == pytest.approx(steps, abs=1e-4)
    assert steps[-1] < steps[0] - 0.1  # something was learned


def test_mlx_lm_generates_what_our_chat_says(tmp_path: Path, ride: RideOf, tiny_llama: Path) -> None:
    run = ride(profile_of(tiny_llama, write_rows(tmp_path / "rows", 30), train={"steps": 5000}))
    run.until_step(5)
    run.send(Pause())
    run.until(lambda event: isinstance(event, StateChanged) and event.state is State.PAUSED)
    run.send(Checkpoint())
    question = "What is passage 3 about?"
    run.send(Generate(answer="adapter", prompt=question, max_tokens=12, temperature=0))
    run.send(Generate(answer="base", prompt=question, max_tokens=12, temperature=0, base=True))
    for _ in range(2):
        run.until(lambda event: isinstance(event, AnswerEnded) and event.answer == "base")
        run.until(lambda event: isinstance(event, AnswerEnded) and event.answer == "adapter")
    run.send(Stop(checkpoint=False))
    run.end()
    said = {name: "".join(event.text for event in run.of(AnswerText) if event.answer == name) for name in PANELS}
    for name, adapter in (("adapter", str(choose_checkpoint(run.run, "latest").path)), ("base", None)):
        model, tokenizer = load(str(tiny_llama), adapter_path=adapter)
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert generate(model, tokenizer, prompt, max_tokens=12) == said[name], name
    assert said["adapter"] != said["base"]


def assert_same_end(one: RunDirectory, other: RunDirectory) -> None:
    assert losses(one) == losses(other)
    for name in ("adapters.safetensors", "optimizer.safetensors"):
        first, second = (mx.load(str(choose_checkpoint(run, "latest").path / name)) for run in (one, other))
        assert first.keys() == second.keys()  # type: ignore[union-attr]
        for key in first:
            same = first[key].dtype == second[key].dtype and mx.array_equal(first[key], second[key])  # type: ignore[index]
            assert same, key


@pytest.mark.parametrize("backward", ["whole", "layerwise"])
def test_a_killed_run_goes_on_bit_for_bit(backward: str, tmp_path: Path, ride: RideOf, tiny_llama: Path) -> None:
    profile = profile_of(
        tiny_llama,
        write_rows(tmp_path / "rows", 40),
        adapter={"dropout": 0.05},
        train={"steps": 20, "backward": backward},
        checkpoint={"every": 10},
    )
    alone = ride(profile)
    alone.end()

    identity = {"profile": profile.model_dump(mode="json", by_alias=True), "environment": environment()}
    killed = create_run(tmp_path / "killed", "run", identity)
    process = subprocess.Popen([sys.executable, "-c", TRAIN, str(killed.path)])
    assert process.wait(60) == -signal.SIGKILL
    assert [checkpoint.step for checkpoint in list_checkpoints(killed)] == [10]
    assert ride(profile, resume=killed).end().step == 20
    assert_same_end(killed, alone.run)


def test_going_on_from_an_adapter(tmp_path: Path, ride: RideOf, tiny_llama: Path) -> None:
    rows = write_rows(tmp_path / "rows", 30)
    first = ride(profile_of(tiny_llama, rows))
    first.end()
    second = ride(profile_of(tiny_llama, rows, adapter={"init_from": first.run.name}, train={"learning_rate": 1e-12}))
    second.end()
    folders = [choose_checkpoint(run.run, "latest").path for run in (first, second)]
    before, after = (mx.load(str(folder / "adapters.safetensors")) for folder in folders)
    assert before.keys() == after.keys()  # type: ignore[union-attr]
    assert all(np.allclose(before[name], after[name], atol=1e-6) for name in before)  # type: ignore[index]


def test_padding_is_small_and_told(tmp_path: Path, ride: RideOf, tiny_llama: Path) -> None:
    rows = write_rows(tmp_path / "rows", 200)
    run = ride(profile_of(tiny_llama, rows, train={"batch_size": 16, "micro_batch_size": 4, "sequence_length": 256}))
    run.end()
    shares = [step.metrics["real_token_share"] for step in run.of(StepCompleted)]
    assert 0.8 < np.mean(shares) <= 1
    assert any("rows to learn from" in event.text for event in run.of(Notice))


# Refused in one line, before anything is trained


def _empty_answer(rows: Path, base: Path) -> dict[str, Any]:
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": " "}]}
    rows.write_text(rows.read_text() + json.dumps(row) + "\n")
    return {}


def _no_keys(rows: Path, base: Path) -> dict[str, Any]:
    rows.write_text(rows.read_text() + json.dumps({"question": "What?"}) + "\n")
    return {}


def _no_template(rows: Path, base: Path) -> dict[str, Any]:
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    return {}


def _small_vocabulary(rows: Path, base: Path) -> dict[str, Any]:
    other = write_tiny_llama(base.parent / "small", vocab=270)
    for name in ("model.safetensors", "config.json"):
        (base / name).write_bytes((other / name).read_bytes())
    return {}


def _another_adapter(rows: Path, base: Path) -> dict[str, Any]:
    config = json.loads((base / "config.json").read_text())
    model = instantiate({**config, "hidden_size": 64})
    adapter = Adapter(rank=4, alpha=8)
    attach(model, adapter, 0)
    folder = base.parent / "adapter"
    folder.mkdir()
    save_adapter(folder, model.trainable_parameters(), adapter_config(adapter, model, "somebody/else"))
    return {"adapter": {"init_from": str(folder)}}


BAD = {
    "target": (
        lambda rows, base: {"adapter": {"targets": ["q_projection"]}},
        r"adapter.targets: 'q_projection' is no module .* did you mean 'q_proj'\? it has down_proj, gate_proj, .*",
    ),
    "row without keys": (_no_keys, r".*train\.jsonl: line 31: .*messages.*"),
    "empty answer": (_empty_answer, r".*train\.jsonl: line 31: .*empty.*"),
    "no template": (_no_template, r".*template.*chat_template.*"),
    "vocabulary": (_small_vocabulary, r".*its tokenizer made token \d+, but the model has 270.*"),
    "adapter of another model": (_another_adapter, r".*adapter: its .* is 64 x 4, this model's is 32 x 4 .*else.*"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_line_before_anything_is_trained(name: str, tmp_path: Path, ride: RideOf) -> None:
    spoil, said = BAD[name]
    base, rows = write_tiny_llama(tmp_path / "base"), write_rows(tmp_path / "rows", 30)
    ended = (run := ride(profile_of(base, rows, **spoil(rows, base)))).end()
    assert ended.exit_code == 2 and ended.step == 0 and not run.of(StepCompleted)
    assert "\n" not in ended.reason
    assert re.fullmatch(said, ended.reason), ended.reason


EARLY = {
    "rows": (
        {"data": {"files": ["/nowhere/rows.jsonl"]}},
        r"data\.files: /nowhere/rows\.jsonl: no such file or folder",
    ),
    "held-out rows": ({"data": {"heldout_files": ["/nowhere.jsonl"]}}, r"data\.heldout_files: /nowhere\.jsonl: .*"),
    "template": ({"data": {"chat_template": "/nowhere"}}, r"data\.chat_template: /nowhere: No such file or directory"),
    "adapter": ({"adapter": {"init_from": "nobody"}}, r"adapter\.init_from = 'nobody': neither a run in .*"),
    "rank": ({"adapter": {"rank": 8, "alpha": 16}}, r".*its adapter has rank 4, adapter\.rank is 8"),
    "scale": ({"adapter": {"alpha": 16}}, r".*its adapter has scale 2, .* set adapter\.alpha = 8"),
    "method": ({"adapter": {"method": "dora"}}, r".*its adapter is of method lora, adapter\.method is dora"),
    "layers": ({"adapter": {"layers": 1}}, r".*its adapter is on 2 layers, adapter\.layers is 1"),
    "targets": (
        {"adapter": {"targets": "q_proj"}},
        r".*its adapter has .*down_proj\.lora_a, which is not trained here.*",
    ),
}


@pytest.mark.parametrize("name", EARLY)
def test_what_is_here_is_looked_at_before_what_takes_long(name: str, tmp_path: Path, tiny_llama: Path) -> None:
    """Before a base is downloaded; where that is needed too, before the rows, which are broken, are read."""
    sections, said = EARLY[name]
    sections = {**sections, "adapter": {"init_from": str(tmp_path / "saved"), **sections.get("adapter", {})}}
    model, adapter = instantiate(json.loads((tiny_llama / "config.json").read_text())), Adapter(rank=4, alpha=8)
    attach(model, adapter, 0)
    (tmp_path / "saved").mkdir()
    save_adapter(tmp_path / "saved", model.trainable_parameters(), adapter_config(adapter, model, "base"))
    (tmp_path / "rows.jsonl").write_text("broken")
    base = str(tiny_llama) if name in ("layers", "targets") else "nobody/nothing"
    with pytest.raises(UserError) as raised:
        make_task(profile_of(Path(base), tmp_path / "rows.jsonl", **sections), tmp_path)
    assert re.fullmatch(said, str(raised.value)), raised.value


def test_the_benchmark_against_mlx_lm_runs_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(Path(__file__).parent / "benchmarks" / "lora_step.py")

    def printed(*options: str) -> list[str]:
        small = ["--shapes", "2x64", "--bits", "16", "--steps", "1", "--skipped", "1"]
        monkeypatch.setattr(sys, "argv", [script, *options, *small])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out.splitlines()

    [case] = [line.split() for line in printed("--cases", "best")[2:]]  # in a process of its own, as each of them has
    assert case[2] == "best" and float(case[4]) > 0 and case[5:] == ["1.00", "1.00"]
    for way in ("whole", "layerwise"):  # what such a process does
        [result] = map(json.loads, printed("--case", way))
        assert result["tokens_per_second"] > 0 and result["peak_bytes"] > 10**7


def test_who_asks_while_it_loads_and_is_stopped_is_told(tmp_path: Path, tiny_llama: Path) -> None:
    engine = Engine(
        create_run(tmp_path / "runs", "run", {"environment": environment()}),
        profile_of(tiny_llama, write_rows(tmp_path / "rows", 30)),
    )
    mailbox = engine.subscribe()
    engine.send(Generate(answer="a", prompt="What?"))
    engine.send(Stop())
    engine.start()
    ended = engine.join(60)
    assert ended is not None and (ended.state, ended.exit_code) == (State.STOPPED, 0)
    answers = [event for event in mailbox.take() if isinstance(event, AnswerEnded)]
    assert [(event.answer, event.reason) for event in answers] == [("a", "run ended")]

"""The demo's base, pretrained here, and the questions that it is taught to answer."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from queue import SimpleQueue

import pytest

from engine.backend import mx
from engine.commands import Command, Stop
from engine.data.python_questions import python_questions
from engine.errors import UserError
from engine.events import Event, LoadingProgress
from engine.loading import Interrupted, Loading
from engine.models.demo_llama import Pretraining, demo_llama
from engine.profile_retention import TextData

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import load

TINY = Pretraining(
    width=32, layers=2, heads=2, vocab_size=300, steps=40, batch_size=4, sequence_length=32, learning_rate=1e-2
)
QUESTION = [{"role": "user", "content": "What is a lambda?"}]
ANSWER = [{"role": "assistant", "content": "In short: a function without a name."}]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextData:
    folder = tmp_path_factory.mktemp("text")
    for key in sorted(topics)[:12]:
        (folder / f"{key}.txt").write_text(topics[key], encoding="utf-8")
    return TextData(files=[str(folder)])


@pytest.fixture(scope="module")
def base(text: TextData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_llama(Loading(), TINY, text, tmp_path_factory.mktemp("models"))


def stopped_at(step: int) -> Loading:
    """A loading that is asked to stop when it has told of that step."""
    inbox = SimpleQueue[Command]()

    def say(event: Event) -> None:
        if isinstance(event, LoadingProgress) and event.unit == "steps" and event.done >= step:
            inbox.put(Stop())

    return Loading(say, inbox)


def every_event(told: Callable[[LoadingProgress], None]) -> Loading:
    class EveryStep(Loading):
        def progress(self, what: str, done: float, total: float | None, unit: str = "") -> None:
            told(LoadingProgress(what=what, done=done, total=total, unit=unit))

    return EveryStep()


def test_mlx_lm_loads_it_and_it_has_learned(base: Path) -> None:
    model, tokenizer = load(str(base))
    ids = tokenizer.encode(topics["while"])[:256]
    rows = mx.array([ids])
    loss = nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:], reduction="mean").item()
    assert loss < 0.8 * math.log(TINY.vocab_size)  # what knowing nothing costs
    assert all(array.dtype == mx.float32 for _, array in tree_flatten(model.parameters()))
    assert tokenizer.eos_token_ids == {json.loads((base / "config.json").read_text())["eos_token_id"]}


def test_its_template_is_plain_and_ends_an_answer(base: Path) -> None:
    _, tokenizer = load(str(base))
    asked = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(QUESTION + ANSWER, return_dict=False)
    assert tokenizer.decode(asked) == "Question: What is a lambda?\nAnswer:\n"
    assert whole[: len(asked)] == asked
    end = whole.index(tokenizer.eos_token_id)
    assert tokenizer.decode(whole[len(asked) : end]) == ANSWER[0]["content"]


def test_it_is_made_once_and_anew_where_it_was_damaged(base: Path, text: TextData) -> None:
    told: list[LoadingProgress] = []
    assert demo_llama(every_event(told.append), TINY, text, base.parent) == base
    assert not told
    other = demo_llama(every_event(told.append), Pretraining(**{**vars(TINY), "steps": 2}), text, base.parent)
    assert other != base
    assert [(event.done, event.total) for event in told if event.unit == "steps"] == [(0, 2), (1, 2), (2, 2)]
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").unlink()
    assert demo_llama(Loading(), Pretraining(**{**vars(TINY), "steps": 2}), text, base.parent) == other
    assert (other / "model.safetensors").read_bytes() == weights


def test_interrupted_it_leaves_nothing_and_comes_out_the_same_afterwards(
    base: Path, text: TextData, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        demo_llama(stopped_at(0), TINY, text, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    abandoned = tmp_path / f".building-{base.name}-x"  # what a killed process leaves
    abandoned.mkdir()
    again = demo_llama(Loading(), TINY, text, tmp_path)
    assert not abandoned.exists()
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in base.iterdir()
    }


def test_a_second_run_waits_for_the_first_and_can_be_stopped_meanwhile(text: TextData, tmp_path: Path) -> None:
    waited: list[str] = []

    def second(event: LoadingProgress) -> None:
        waited.append(event.what)
        raise Interrupted("stopped while it waits")

    def first(event: LoadingProgress) -> None:
        if event.done == 1:
            with pytest.raises(Interrupted):
                demo_llama(every_event(second), settings, text, tmp_path)

    settings = Pretraining(**{**vars(TINY), "steps": 2})
    assert (demo_llama(every_event(first), settings, text, tmp_path) / "config.json").is_file()
    assert waited == ["waiting for another run that pretrains the demo's base"]


def test_a_cache_that_cannot_be_written_is_one_line(text: TextData, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"model cache .*RETENTION_TUI_CACHE"):
        demo_llama(Loading(), TINY, text, tmp_path / "file" / "models")


def test_every_answer_is_in_the_one_style_and_short() -> None:
    rows = python_questions()
    assert len(rows) > 500
    for row in rows:
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert re.fullmatch(r"In short: .+[.!?] Ask help\(\) for more\.", answer["content"])
        assert len(answer["content"]) <= 200
    for turn in (0, 1):  # so no held-out question, nor its answer, is one of training
        assert len({row["messages"][turn]["content"] for row in rows}) == len(rows)


def test_rows_are_the_same_in_a_process_that_has_changed_hooks_and_loggers() -> None:
    code = (
        "import json, logging, sys, threading, warnings\n"
        "def hook(*args): 'Something else altogether, and it should not be told.'\n"
        "sys.excepthook = threading.excepthook = warnings.showwarning = hook\n"
        "logging.Logger.once = lambda self: None\n"
        "logging.Logger.once.__doc__ = 'A method that a library has added to it.'\n"
        "logging.Logger.once.__module__ = 'somebody.elses'\n"
        "from engine.data.python_questions import python_questions\n"
        "print(json.dumps(python_questions()))\n"
    )
    told = subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"],
                          capture_output=True, check=True, text=True).stdout  # fmt: skip
    assert json.loads(told) == python_questions()

"""Rows of a fine-tuning: read, understood, templated, masked, split, and put into batches by length."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import TEMPLATE, tiny_row, write_rows, write_tiny_llama

from engine.commands import Command, Stop
from engine.data.chat_dataset import ChatDataset, Examples, load_chat_data
from engine.data.length_batches import examples_of
from engine.data.packing import order
from engine.data.python_questions import CLOSING, OPENING
from engine.errors import UserError
from engine.events import Event
from engine.loading import Interrupted, Loading
from engine.profile_lora import ChatData

from mlx_lm.tuner import datasets
from mlx_lm.tuner.trainer import iterate_batches
from mlx_lm.utils import load_tokenizer

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen's, and it says of itself which tokens are answers, so that transformers can be asked."""
PLENTY = 4096
WORDS = st.text(st.sampled_from("ab de\n é漢🦊<|_>:"), min_size=1, max_size=30).filter(str.strip)


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def with_template(folder: Path, template: str) -> Any:
    write_tiny_llama(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


def rows_file(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    """Writes rows; a string is a line as it is."""
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    """Messages by turns, the user first."""
    return {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)],
        **more,
    }


def load(
    tokenizer: Any, length: int = PLENTY, seed: int = 0, said: list[Event] | None = None, **data: Any
) -> ChatDataset:
    loading = Loading() if said is None else Loading(said.append)
    return load_chat_data(ChatData(**data), tokenizer, length, seed, loading)


def everything(dataset: ChatDataset) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All rows of both sides: their tokens, and the places of those that are learned."""
    found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for side in (dataset.train, dataset.heldout):
        for index in range(len(side)):
            rows, counted, real = side.batch([index], multiple=1)
            assert real == rows.shape[1] - 1 == side.lengths[index]
            found[tuple(rows[0].tolist()), tuple((np.flatnonzero(counted[0]) + 1).tolist())] += 1
    return found


def learned(dataset: ChatDataset, tokenizer: Any) -> Counter[str]:
    return Counter(
        tokenizer.decode([tokens[place] for place in places])
        for (tokens, places), count in everything(dataset).items()
        for _ in range(count)
    )


def refused(tokenizer: Any, **data: Any) -> str:
    with pytest.raises(UserError) as raised:
        load(tokenizer, **data)
    message = str(raised.value)
    assert message and "\n" not in message
    return message


# Tokens and masks


@pytest.mark.parametrize(
    ("kind", "loss_on"),
    [("text", "all"), *((kind, on) for kind in ("messages", "tools", "completion") for on in ("all", "last-answer"))],
)
def test_tokens_and_masks_are_those_of_mlx_lm(tokenizer: Any, tmp_path: Path, kind: str, loss_on: str) -> None:
    write_rows(tmp_path, 12, kind)
    mask = loss_on != "all"
    theirs, _, _ = datasets.load_local_dataset(tmp_path, tokenizer, SimpleNamespace(mask_prompt=mask))
    expected: Counter[Any] = Counter()
    for index in range(len(theirs)):
        tokens, offset = theirs.process(theirs[index])
        assert offset > 0 or not mask
        expected[tuple(tokens), tuple(range(max(offset, 1), len(tokens)))] += 1
    assert everything(load(tokenizer, files=[str(tmp_path)], loss_on=loss_on)) == expected


def test_batches_are_those_of_mlx_lm(tokenizer: Any, tmp_path: Path) -> None:
    """Where no row is padded, for mlx-lm counts one token of padding."""
    length = 64
    write_rows(tmp_path, 12, "completion")  # all are longer
    theirs, _, _ = datasets.load_local_dataset(tmp_path, tokenizer, SimpleNamespace(mask_prompt=True))
    cut = [theirs.process(theirs[index]) for index in range(len(theirs))]
    ours = load(tokenizer, length, files=[str(tmp_path)], loss_on="last-answer")
    expected = {}
    for batch, borders in iterate_batches(cut, batch_size=4, max_seq_length=length + 1):
        for row, (start, end) in zip(np.array(batch), borders.tolist(), strict=True):
            steps = np.arange(1, length + 1)
            expected[row.tobytes()] = ((steps >= start) & (steps <= end)).tolist()
    found = {}
    for side in (ours.train, ours.heldout):
        rows, counted, _ = side.batch(range(len(side)))
        found |= {row.tobytes(): mask.tolist() for row, mask in zip(rows, counted, strict=True)}
    assert len(found) == 12 and found == expected


@settings(max_examples=40, deadline=None)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=2, max_size=4, unique=True), system=st.none() | WORDS)
def test_answers_are_the_tokens_that_a_template_marks_itself(
    turns: list[tuple[str, str]], system: str | None, chatml: Any, folder: Path
) -> None:
    rows = []
    expected: Counter[Any] = Counter()
    for upto in range(1, len(turns) + 1):
        messages = chat(*(text for turn in turns[:upto] for text in turn))["messages"]
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        rows.append({"messages": messages})
        marked = chatml._tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        places = np.flatnonzero(marked["assistant_masks"]).tolist()
        expected[tuple(marked["input_ids"]), tuple(places)] += 1
    assert everything(load(chatml, files=[rows_file(folder, rows)], loss_on="answers")) == expected


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="session")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return with_template(tmp_path_factory.mktemp("chatml") / "model", CHATML)


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look_up"}}]}


def calling(*texts: str) -> dict[str, Any]:
    """A conversation whose first answer is a call of a tool."""
    question, *others = chat(*texts)["messages"]
    return {"messages": [question, CALL, {"role": "tool", "content": "found"}, *others]}


def test_what_is_learned_reads_as_the_answers(tmp_path: Path) -> None:
    calls = "{{ message['content'] }}{% for call in message.tool_calls %}<{{ call.function.name }}>{% endfor %}"
    tokenizer = with_template(tmp_path / "model", TEMPLATE.replace("{{ message['content'] }}", calls))
    rows = [chat("a?", "One.", "b?", "Two."), chat("c?", "Three."), calling("d?", "Four.")]
    files = [rows_file(tmp_path, rows)]
    end = tokenizer.eos_token
    every = load(tokenizer, files=files, loss_on="answers")
    expected = [f"One.{end}\nTwo.{end}\n", f"Three.{end}\n", f"<look_up>{end}\nFour.{end}\n"]
    assert learned(every, tokenizer) == Counter(expected)
    last = load(tokenizer, files=files, loss_on="last-answer")
    assert learned(last, tokenizer) == Counter([f"Two.{end}\n", f"Three.{end}\n", f"Four.{end}\n"])


def test_what_the_template_has_no_place_for_is_said(chatml: Any, tmp_path: Path) -> None:
    """An answer of which nothing would be left is refused; what else is not learned is counted."""
    files = [rows_file(tmp_path, [chat("a?", "One."), calling("d?", "Four.")])]
    message = refused(chatml, files=files)
    assert "rows.jsonl: line 2: the chat template has no place for tool_calls: the answer is empty" in message
    assert "(message 2)" in message
    told = {**CALL, "content": "I look it up."}
    rows = [tiny_row(1, "tools"), {"messages": [*chat("d?")["messages"], told]}, tiny_row(2, "tools")]
    lines = [line for line in texts_of(chatml, files=[rows_file(tmp_path, rows)]) if "no place" in line]
    assert [line.partition(": not learned")[0] for line in lines] == [
        "data: the chat template has no place for tools, which 2 rows have",
        "data: the chat template has no place for tool_calls, which 1 row has",
    ]
    assert "rows.jsonl: line 1" in lines[0] and "rows.jsonl: line 2" in lines[1]


def test_a_role_that_a_template_names_is_known(tmp_path: Path) -> None:
    rows = [chat("a?", "One."), {"messages": [{"role": "critic", "content": "Hm."}, *chat("b?", "Two.")["messages"]]}]
    files = [rows_file(tmp_path, rows)]
    naming = with_template(tmp_path / "model", "{% if messages[0].role == 'critic' %}!{% endif %}" + TEMPLATE)
    assert "critic:\nHm." in "".join(learned(load(naming, files=files), naming))
    assert "line 2: the chat template knows no role 'critic'" in refused(
        load_tokenizer(tmp_path / "model"), files=files
    )


def test_in_plain_text_the_answer_is_what_follows_a_marker(tokenizer: Any, tmp_path: Path) -> None:
    files = [rows_file(tmp_path, [{"text": "Q: a A: One. Q: b A: Two."}, {"text": "Q: c A: Three."}])]
    end = tokenizer.eos_token
    first = load(tokenizer, files=files, loss_on="answers", answer_after="A:")
    assert learned(first, tokenizer) == Counter([f" One. Q: b A: Two.{end}", f" Three.{end}"])
    last = load(tokenizer, files=files, loss_on="last-answer", answer_after="A:")
    assert learned(last, tokenizer) == Counter([f" Two.{end}", f" Three.{end}"])


def test_a_prompt_that_holds_more_than_the_whole_is_followed_as_far_as_both_agree(tmp_path: Path) -> None:
    """As those of models that think, whose prompt begins a thought that a finished conversation no longer has."""
    thinking = with_template(tmp_path / "model", TEMPLATE.replace("assistant:\n{%", "assistant:\n<think>\n{%"))
    found = load(thinking, files=[rows_file(tmp_path, [chat("a?", "One."), chat("b?", "Two.")])], loss_on="answers")
    end = thinking.eos_token
    assert learned(found, thinking) == Counter([f"One.{end}\n", f"Two.{end}\n"])


def test_an_end_that_the_template_writes_once_is_learned_once(tmp_path: Path) -> None:
    """As Phi's, whose end of text comes after the last message alone."""
    closing = with_template(
        tmp_path / "model",
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}.\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}",
    )
    rows = [chat("a?", "One", "b?", "Two"), chat("c?", "Three")]
    found = load(closing, files=[rows_file(tmp_path, rows)], loss_on="answers")
    end = closing.eos_token
    assert learned(found, closing) == Counter([f"One.\nTwo.\n{end}", f"Three.\n{end}"])


def test_a_template_that_rewrites_what_was_said_is_refused(tmp_path: Path) -> None:
    rewriting = with_template(
        tmp_path / "model",
        "{% for message in messages %}{% if loop.last and message.role == 'assistant' %}(last) {% endif %}"
        "{{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    )
    two = chat("a?", "One.", "b?", "Two.")
    message = refused(rewriting, files=[rows_file(tmp_path, [two, two])], loss_on="answers")
    assert "line 1" in message and "message 2" in message and 'data.loss_on = "last-answer"' in message
    message = refused(rewriting, files=[rows_file(tmp_path, [chat("a?", "One."), two])], loss_on="last-answer")
    assert "line 1" in message and 'data.loss_on = "all"' in message


def test_a_template_that_writes_the_date_makes_the_same_rows_every_day(tmp_path: Path) -> None:
    dated = with_template(tmp_path / "model", "{{ strftime_now('%d %b %Y') }}\n" + TEMPLATE)
    found = load(dated, files=[rows_file(tmp_path, [chat("a?", "One."), chat("b?", "Two.")])])
    assert all(text.startswith("6 Jul 2024\nuser") for text in learned(found, dated))  # the first token has no past


# Formats

TALKS = [("What is it?", "A thing.", "Why?", "Because."), ("Who?", "Me."), ("Where to?", "There."), ("When?", "Now.")]


def as_llama2(talk: tuple[str, ...], system: str = "") -> str:
    turns = [f"<s>[INST] {ask} [/INST] {answer} </s>" for ask, answer in zip(talk[::2], talk[1::2], strict=True)]
    return "".join(turns).replace("[INST] ", f"[INST] {system}", 1)


def as_tree(talk: tuple[str, ...], name: str) -> list[dict[str, Any]]:
    """A best path among worse and deleted replies, in the order of a file that is none of a tree's."""
    rows = []
    for place, text in enumerate(talk):
        parent = f"{name}{place - 1}" if place else None
        role = ("prompter", "assistant")[place % 2]
        common = {"parent_id": parent, "role": role, "lang": "en", "deleted": False}
        rows.append({**common, "message_id": f"{name}{place}", "text": text, "rank": 0 if place % 2 else None})
        if place % 2:
            rows.insert(0, {**common, "message_id": f"{name}{place}w", "text": "Worse.", "rank": 1})
            rows.insert(0, {**common, "message_id": f"{name}{place}u", "text": "Unranked.", "rank": None})
            deleted = {"text": "Gone.", "rank": -1, "deleted": True}
            rows.insert(0, {**common, "message_id": f"{name}{place}d", **deleted})
    last = {"parent_id": f"{name}{len(talk) - 1}", "role": "prompter", "text": "Thanks!"}
    return [*rows, {**last, "message_id": f"{name}!", "lang": "en", "deleted": False, "rank": None}]


def shared(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


FORMATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "messages": ([chat(*talk) for talk in TALKS], {}),
    "own key": ([{"talk": chat(*talk)["messages"]} for talk in TALKS], {"messages_key": "talk"}),
    "llama2": ([{"text": as_llama2(talk)} for talk in TALKS], {}),
    "oasst": ([row for name, talk in zip("abcd", TALKS, strict=True) for row in as_tree(talk, name)], {}),
    "sharegpt": ([{"conversations": shared(*talk)} for talk in TALKS], {}),
    "sharegpt of an own key": ([{"talk": shared(*talk)} for talk in TALKS], {"messages_key": "talk"}),
    "completion": ([{"prompt": talk[0], "completion": talk[1]} for talk in TALKS[1:]], {}),
    "own keys": (
        [{"q": talk[0], "a": talk[1]} for talk in TALKS[1:]],
        {"prompt_key": "q", "completion_key": "a"},
    ),
    "alpaca": ([{"instruction": talk[0], "input": "", "output": talk[1]} for talk in TALKS[1:]], {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_say_the_same(tokenizer: Any, tmp_path: Path, name: str) -> None:
    """From JSON lines and from Parquet, with the format named and found."""
    rows, keys = FORMATS[name]
    single = len(TALKS) - 1
    talks = TALKS if len(rows) != single else TALKS[1:]
    expected = load(tokenizer, files=[rows_file(tmp_path, [chat(*t) for t in talks], "x.jsonl")], loss_on="answers")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found_as = {"own key": "messages", "own keys": "completion", "sharegpt of an own key": "sharegpt"}
    format = found_as.get(name, name)
    for file in (rows_file(tmp_path, rows), str(tmp_path / "rows.parquet")):
        for named in ("auto", format):
            found = load(tokenizer, files=[file], loss_on="answers", format=named, **keys)
            assert found.digest == expected.digest
            assert found.summary.format == format


def test_systems_inputs_and_tools_reach_the_template(tokenizer: Any, tmp_path: Path) -> None:
    end = tokenizer.eos_token
    system = rows_file(tmp_path, [{"text": as_llama2(talk, "<<SYS>>\nBe kind.\n<</SYS>>\n\n")} for talk in TALKS[1:]])
    texts = learned(load(tokenizer, files=[system]), tokenizer)
    assert f"ystem:\nBe kind.{end}\nuser:\nWho?{end}\nassistant:\nMe.{end}\n" in texts
    sharegpt = [{"system": "Be kind.", "conversations": shared(*talk)} for talk in TALKS[1:]]
    assert learned(load(tokenizer, files=[rows_file(tmp_path, sharegpt)]), tokenizer) == texts
    alpaca = [{"instruction": "Sum up.", "input": ask, "output": answer} for ask, answer in TALKS[1:]]
    texts = learned(load(tokenizer, files=[rows_file(tmp_path, alpaca)]), tokenizer)
    assert f"ser:\nSum up.\n\nWho?{end}\nassistant:\nMe.{end}\n" in texts
    tools = [tiny_row(index, "tools") for index in range(4)]
    plain = load(tokenizer, files=[rows_file(tmp_path, tools)])
    assert all(text.startswith("ools: [{") for text in learned(plain, tokenizer))
    for row in tools:  # as tables without nested columns have them
        row["tools"] = json.dumps(row["tools"])
    assert load(tokenizer, files=[rows_file(tmp_path, tools)]).digest == plain.digest


def test_nulls_of_a_table_are_keys_that_a_row_has_not(tokenizer: Any, tmp_path: Path) -> None:
    """A column of structs has every key in every row."""
    rows = [tiny_row(index, "messages") for index in range(4)]
    expected = load(tokenizer, files=[rows_file(tmp_path, rows)])
    rows[0]["messages"][1]["tool_calls"] = None
    with_nulls = [*rows, {"messages": [{"role": "user", "content": "a?", "name": "me"}]}]
    table = pa.Table.from_pylist(with_nulls[-1:] + with_nulls[:-1]).slice(1)
    pq.write_table(table, tmp_path / "rows.parquet")
    assert load(tokenizer, files=[str(tmp_path / "rows.parquet")]).digest == expected.digest


def test_built_in_questions(tokenizer: Any) -> None:
    found = load(tokenizer, builtin="python-docs", loss_on="answers", most_rows=40)
    assert len(found.train) + len(found.heldout) == 40
    ends = CLOSING.partition("{")[0]
    assert all(text.startswith(OPENING) and ends in text for text in learned(found, tokenizer))


# Held-out rows


def test_a_folder_is_mlx_lms(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, 9)
    (tmp_path / "valid.jsonl").write_text(json.dumps(chat("Aside?", "Yes.")) + "\n", encoding="utf-8")
    found = load(tokenizer, files=[str(tmp_path)])
    assert (len(found.train), len(found.heldout)) == (9, 1)
    named = load(tokenizer, files=[str(tmp_path / "train.jsonl")], heldout_files=[str(tmp_path / "valid.jsonl")])
    assert named.digest == found.digest
    assert load(tokenizer, files=[str(tmp_path / "train.jsonl")]).digest != found.digest


def test_held_out_rows_that_are_learned_too_are_said(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, 9)
    write_rows(tmp_path, 2, name="valid")
    assert any("2 of 2 held-out rows are learned too" in line for line in texts_of(tokenizer, files=[str(tmp_path)]))


def texts_of(tokenizer: Any, length: int = PLENTY, **data: Any) -> list[str]:
    said: list[Event] = []
    load(tokenizer, length, said=said, **data)
    return [text for event in said if (text := getattr(event, "text", ""))]


@settings(max_examples=25, deadline=None)
@given(
    copies=st.lists(st.integers(1, 5), min_size=2, max_size=12),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 99),
)
def test_equal_rows_fall_on_one_side(
    copies: list[int], fraction: float, seed: int, tokenizer: Any, folder: Path
) -> None:
    rows = [chat(f"What is {index}?", f"{index}!") for index, count in enumerate(copies) for _ in range(count)]
    found = load(tokenizer, files=[rows_file(folder, rows)], heldout_fraction=fraction, seed=seed)
    sides = [
        {tuple(side.batch([index])[0][0].tolist()) for index in range(len(side))}
        for side in (found.train, found.heldout)
    ]
    assert len(found.train) + len(found.heldout) == len(rows)
    assert all(sides) and not sides[0] & sides[1]
    allowed = max(fraction * len(rows) + max(copies) / 2, *sorted(copies)[:2])
    assert len(found.heldout) <= allowed


def test_seed_chooses_rows_and_digest_names_the_outcome(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, 30)
    files = [str(tmp_path)]
    digests = {
        load(tokenizer, files=files, seed=seed, most_rows=most, loss_on=loss, length=length).digest
        for seed in (0, 1)
        for most in (None, 10)
        for loss in ("all", "answers")
        for length in (150, PLENTY)
    }
    assert len(digests) == 16
    assert load(tokenizer, files=files).digest == load(tokenizer, files=files).digest
    assert load(tokenizer, files=files, most_rows=10).summary.rows == 9


# Truncation


def test_truncation_is_counted_and_said(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, 20)
    full = load(tokenizer, files=[str(tmp_path)])
    lengths = np.concatenate([full.train.lengths, full.heldout.lengths])
    limit = int(np.median(lengths))
    cut = load(tokenizer, limit, files=[str(tmp_path)])
    assert cut.train.lengths.max() == limit
    assert cut.summary.truncated_rows == (lengths > limit).sum()
    assert cut.summary.truncated_tokens == (lengths - limit)[lengths > limit].sum()
    kept = np.concatenate([cut.train.lengths, cut.heldout.lengths])
    assert kept.sum() + cut.summary.truncated_tokens == lengths.sum()
    assert cut.summary.lengths.histogram == tuple(
        int(((cut.train.lengths >= 1 << power) & (cut.train.lengths < 2 << power)).sum())
        for power in range(int(cut.train.lengths.max()).bit_length())
    )
    lines = texts_of(tokenizer, limit, files=[str(tmp_path)])
    assert any(f"{cut.summary.truncated_rows} rows" in line and "cut off" in line for line in lines)
    assert not any("cut off" in line for line in texts_of(tokenizer, files=[str(tmp_path)]))


def test_rows_whose_answer_is_cut_off_are_left_out_and_said(tokenizer: Any, tmp_path: Path) -> None:
    rows = [chat("a?", "One."), chat("b?", "Two."), chat("long " * 40 + "?", "Three.")]
    files = [rows_file(tmp_path, rows)]
    found = load(tokenizer, 40, files=files, loss_on="answers")
    assert len(found.train) + len(found.heldout) == 2 and found.summary.truncated_rows == 0
    (line,) = [line for line in texts_of(tokenizer, 40, files=files, loss_on="answers") if "left out" in line]
    assert "1 row left out" in line and "rows.jsonl: line 3" in line and "40 tokens" in line
    assert load(tokenizer, 40, files=files).summary.truncated_rows == 1  # there is something to learn in its beginning
    with pytest.raises(UserError, match="none of the 3 rows"):
        load(tokenizer, 4, files=files, loss_on="answers")


# What is refused

GOOD = json.dumps(chat("a?", "One."))
BAD_LINES: dict[str, tuple[str, dict[str, Any], str]] = {
    "not JSON": ('{"messages": ', {}, "not valid JSON (Expecting value, character 15); each line"),
    "too deep": ("[" * 100_000, {}, "not valid JSON"),
    "no object": ("[1]", {}, "not list"),
    "no key": ('{"text": "a"}', {}, "has no key 'messages'; its keys are text"),
    "null": ('{"messages": null}', {}, "'messages' is NoneType, not a list"),
    "wrong type": ('{"messages": "a"}', {}, "'messages' is str, not a list"),
    "no messages": ('{"messages": []}', {}, "there are no messages"),
    "no role": ('{"messages": [{"content": "a"}]}', {}, "message 1 should be"),
    "odd role": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}',
        {},
        "no role 'bot' (message 2; known are system, developer, user, assistant, tool, function, ipython; "
        "did you mean 'assistant'?)",
    ),
    "misspelt role": ('{"messages": [{"role": "User", "content": "a"}]}', {}, "did you mean 'user'?"),
    "no content": ('{"messages": [{"role": "user"}]}', {}, "message 1: its content is missing"),
    "content of parts": ('{"messages": [{"role": "user", "content": []}]}', {}, "its content is list, not a string"),
    "empty answer": (json.dumps(chat("a?", " \n")), {}, "the answer is empty"),
    "null answer": ('{"messages": [{"role": "assistant", "content": null}]}', {}, "the answer is empty"),
    "no answer": (json.dumps(chat("a?")), {"loss_on": "answers"}, "there is no answer"),
    "no last answer": (json.dumps(chat("a?", "b", "c?")), {"loss_on": "last-answer"}, "is not the assistant's"),
    "no question": ('{"messages": [{"role": "assistant", "content": "a"}]}', {"loss_on": "answers"}, "begins with"),
    "half a character": (json.dumps(chat("a?", "\ud83d")), {}, "half of a surrogate pair"),
    "odd tools": (json.dumps(chat("a?", "b", tools={})), {}, "'tools' is dict, not a list"),
    "tools not JSON": (
        json.dumps(chat("a?", "b", tools="[")),
        {},
        "'tools' is not valid JSON (Expecting value, character 2)",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_row_is_one_line_with_file_and_line(tokenizer: Any, tmp_path: Path, name: str) -> None:
    line, data, words = BAD_LINES[name]
    message = refused(tokenizer, files=[rows_file(tmp_path, [GOOD, "", line, GOOD])], **data)
    assert "rows.jsonl: line 3: " in message and words in message


BAD_ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "no completion": ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], {}, "line 2: has no key 'completion'"),
    "empty completion": ([{"prompt": "a", "completion": ""}], {}, "line 1: the answer is empty"),
    "number": ([{"prompt": "a", "completion": 1}], {}, "line 1: 'completion' is int, not a string"),
    "null": ([{"instruction": "a", "output": None}], {}, "line 1: 'output' is null"),
    "empty output": ([{"instruction": "a", "input": "", "output": " "}], {}, "line 1: the answer is empty"),
    "empty text": ([{"text": "a"}, {"text": ""}], {}, "line 2: the text is empty"),
    "no marker": ([{"text": "a"}], {"loss_on": "answers"}, "line 1: is plain text"),
    "without marker": ([{"text": "a"}], {"loss_on": "answers", "answer_after": "A:"}, "line 1: has no 'A:'"),
    "nothing after": ([{"text": "a A: "}], {"loss_on": "answers", "answer_after": "A:"}, "line 1: the answer is empty"),
    "no INST": ([{"text": "[INST] a [/INST] b"}, {"text": "a"}], {}, "line 2: does not begin with [INST]"),
    "open INST": ([{"text": "<s>[INST] a"}], {}, "line 1: an [INST] has no [/INST]"),
    "silent INST": ([{"text": "<s>[INST] a [/INST] </s>"}], {}, "line 1: the answer is empty"),
    "odd role": ([{"message_id": "a", "parent_id": None, "role": "user", "text": "a"}], {}, "line 1: role is 'user'"),
    "twice": ([{"message_id": "a", "parent_id": None, "role": "prompter", "text": "a"}] * 2, {}, "line 2: message_id"),
    "odd speaker": (
        [{"conversations": [*shared("a", "b"), {"from": "narrator", "value": "c"}]}],
        {},
        "line 1: from = 'narrator' is no speaker that is known (message 3; known are human, ",
    ),
    "no speaker": ([{"conversations": [*shared("a"), {"value": "b"}]}], {}, "line 1: message 2 should be"),
    "not ShareGPT": ([{"conversations": chat("a", "b")["messages"]}], {}, "line 1: 'conversations' holds no"),
    "unknown": ([{"question": "a", "reply": "b"}], {}, "line 1: its keys (question, reply) say no format"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_of_another_format_is_refused(tokenizer: Any, tmp_path: Path, name: str) -> None:
    rows, data, words = BAD_ROWS[name]
    assert f"rows.jsonl: {words}" in refused(tokenizer, files=[rows_file(tmp_path, rows)], **data)


def not_utf8(folder: Path) -> dict[str, Any]:
    (folder / "rows.jsonl").write_bytes(GOOD.encode() + b"\n\xff\n")
    return {"files": [str(folder / "rows.jsonl")]}


def no_parquet(folder: Path) -> dict[str, Any]:
    (folder / "rows.parquet").write_bytes(b"PAR1 and what is missing")
    return {"files": [str(folder / "rows.parquet")]}


def same_twice(folder: Path) -> dict[str, Any]:
    file = rows_file(folder, [GOOD, GOOD])
    return {"files": [file], "heldout_files": [file]}


BAD_SOURCES: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "missing": (lambda folder: {"files": [str(folder / "none.jsonl")]}, "data.files: … no such file"),
    "empty": (lambda folder: {"files": [rows_file(folder, ["", " "])]}, "data.files: … no row in it"),
    "an empty folder": (lambda folder: {"files": [str(folder)]}, "data.files: … has no train.jsonl or train.parquet"),
    "another suffix": (
        lambda folder: {"files": [rows_file(folder, [GOOD], "a.json")]},
        "should be a .jsonl or .parquet",
    ),
    "not UTF-8": (not_utf8, "line 2: not UTF-8"),
    "not Parquet": (no_parquet, "cannot be read as Parquet"),
    "trained on and held out": (same_twice, "data.heldout_files: … is in data.files too"),
    "equal rows": (lambda folder: {"files": [rows_file(folder, [GOOD, GOOD])]}, "2 rows, all alike"),
    "one row": (lambda folder: {"files": [rows_file(folder, [GOOD])]}, "data: 1 row cannot be split"),
    "no template": (
        lambda folder: {"files": [rows_file(folder, [GOOD])], "chat_template": str(folder / "none")},
        "data.chat_template: … No such file",
    ),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_bad_source_is_one_line(tokenizer: Any, tmp_path: Path, name: str) -> None:
    make, words = BAD_SOURCES[name]
    message = refused(tokenizer, **make(tmp_path))
    place = 0
    for part in words.split(" … "):
        assert part in message[place:]
        place = message.index(part, place)


def test_a_tokenizer_without_a_template_needs_one_for_messages(tmp_path: Path) -> None:
    plain = load_tokenizer(write_tiny_llama(tmp_path / "model", template=False))
    files = [rows_file(tmp_path, [chat("a?", "One."), chat("b?", "Two.")])]
    message = refused(plain, files=files)
    assert "no chat template" in message and "data.chat_template" in message and 'data.format = "text"' in message
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    given = load(plain, files=files, chat_template=str(template))
    assert given.digest == load(load_tokenizer(write_tiny_llama(tmp_path / "model")), files=files).digest
    template.write_text("{% if %}", encoding="utf-8")
    assert "not valid Jinja: line 1" in refused(plain, files=files, chat_template=str(template))


def test_a_template_that_refuses_a_row_is_named_with_it(tmp_path: Path) -> None:
    strict = with_template(
        tmp_path / "model",
        "{% for m in messages %}{% if loop.index0 % 2 != (m.role == 'assistant') | int %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}\n{% endfor %}",
    )
    twice = {"messages": [{"role": "user", "content": "a"}] * 2}
    message = refused(strict, files=[rows_file(tmp_path, [GOOD, twice])])
    assert "rows.jsonl: line 2" in message and "roles must alternate" in message


def test_rows_of_others_are_left_out_where_they_are_empty(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set of the hub, in this machine's cache, which its user cannot mend."""
    cached = tmp_path / "datasets--owner--name"
    (cached / "refs/refs/convert").mkdir(parents=True)
    (cached / "refs/refs/convert/parquet").write_text("0" * 40, encoding="utf-8")
    split = cached / "snapshots" / ("0" * 40) / "default/train"
    split.mkdir(parents=True)
    rows = [{"instruction": ask, "input": None, "output": answer} for ask, answer in TALKS[1:]]
    empty = {"instruction": "a", "output": ""}
    pq.write_table(pa.Table.from_pylist([*rows, empty, empty]), split / "0000.parquet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = load(tokenizer, dataset="owner/name")
    assert len(found.train) + len(found.heldout) == 3
    assert found.summary.left_out == {"the answer is empty": (2, "owner/name/0000.parquet: row 4")}
    wary = "{% if messages[0].content == 'Who?' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    found = load(with_template(tmp_path / "model", wary), dataset="owner/name")
    assert found.summary.left_out["the chat template refuses it"] == (1, "owner/name/0000.parquet: row 1")
    refusing = with_template(tmp_path / "model", "{{ raise_exception('no') }}")
    assert "3: the chat template refuses it" in refused(refusing, dataset="owner/name")
    pq.write_table(pa.Table.from_pylist([empty]), split / "0000.parquet")
    assert "none of the 1 rows can be learned from (1: the answer is empty)" in refused(tokenizer, dataset="owner/name")


def test_a_run_that_shall_end_is_not_made_to_wait(tokenizer: Any, tmp_path: Path) -> None:
    inbox: SimpleQueue[Command] = SimpleQueue()
    inbox.put(Stop())
    with pytest.raises(Interrupted):
        load_chat_data(
            ChatData(files=[str(write_rows(tmp_path, 20))]), tokenizer, 64, 0, Loading(lambda event: None, inbox)
        )


# Batches


def long_tailed(count: int) -> np.ndarray:
    return np.clip(np.random.default_rng(0).lognormal(5, 1, count), 8, 2048).astype(np.int64)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 300), batch=st.integers(1, 70), group=st.integers(1, 64), seed=st.integers(0, 9))
def test_every_epoch_has_every_row_once(count: int, batch: int, group: int, seed: int) -> None:
    lengths = long_tailed(count)
    epochs = 3
    steps = -(-epochs * count // batch)
    batches = [examples_of(lengths, batch, step, seed, group) for step in range(1, steps + 1)]
    assert all(len(chosen) == batch for chosen in batches)
    assert all((np.diff(lengths[chosen]) <= 0).all() for chosen in batches)
    stream = np.concatenate(batches)
    for epoch in range(1, epochs + 1):  # up to the end of the batch in which an epoch ends, no row is behind another
        seen = np.bincount(stream[: epoch * count // batch * batch], minlength=count)
        assert seen.max() <= epoch
        seen = np.bincount(stream[: -(-epoch * count // batch) * batch], minlength=count)
        assert seen.min() >= epoch


def test_order_is_a_function_of_its_arguments() -> None:
    lengths = long_tailed(500)
    later = examples_of(lengths, 8, 200, seed=3)
    for step in range(1, 12):
        examples_of(lengths, 8, step, seed=3)
    assert (examples_of(lengths, 8, 200, seed=3) == later).all()
    assert (examples_of(lengths, 8, 200, seed=4) != later).any()
    epochs = [np.concatenate([examples_of(lengths, 50, e * 10 + s, 0) for s in range(1, 11)]) for e in range(2)]
    assert (epochs[0] != epochs[1]).any() and set(epochs[0]) == set(epochs[1])


def test_rows_of_like_length_meet_but_batches_stay_mixed() -> None:
    lengths = long_tailed(6_000)

    def share(batches: np.ndarray) -> float:
        longest = -(-lengths[batches].max(axis=1) // 32) * 32
        return float(lengths[batches].sum() / (longest * batches.shape[1]).sum())

    at_random = share(order(len(lengths), 0, 0).reshape(-1, 4))
    steps = [examples_of(lengths, 4, step, 0) for step in range(1, 1501)]
    assert share(np.stack(steps)) > 0.8 > at_random + 0.2
    together = np.stack([examples_of(lengths, 128, step, 0).reshape(-1, 4) for step in range(1, 41)])
    assert share(together.reshape(-1, 4)) > 0.8  # micro-batches of a large batch
    # Long and short batches follow each other without a trend: the mean of a hundred of them is near that of all.
    means = np.array([lengths[chosen].mean() for chosen in steps]).reshape(-1, 100).mean(axis=1)
    assert abs(means / lengths.mean() - 1).max() < 0.35


def test_batch_pads_with_what_never_counts(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, 10)
    train: Examples = load(tokenizer, 200, files=[str(tmp_path)], loss_on="answers").train
    short = np.argsort(train.lengths)[:3]
    rows, counted, real = train.batch(short)
    assert rows.dtype == np.int32 and counted.dtype == np.bool_
    assert rows.shape == (3, counted.shape[1] + 1) and counted.shape[1] % 32 == 0
    assert real == train.lengths[short].sum()
    for row, mask, index in zip(rows, counted, short, strict=True):
        alone, alone_mask, _ = train.batch([int(index)], multiple=1)
        length = train.lengths[index]
        assert (row[: length + 1] == alone[0]).all() and not row[length + 1 :].any()
        assert (mask[:length] == alone_mask[0]).all() and not mask[length:].any()
    longest = int(train.lengths.argmax())
    assert train.batch([longest])[0].shape == (1, 201)  # 200 is no multiple of 32
    for bad in ([-1], [len(train)], []):
        with pytest.raises(IndexError):
            train.batch(bad)

"""Tokenizers, reading and splitting text, packing, the order of sequences and the cache."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import shutil
import zlib
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import packing, python_docs
from engine.data.packing import PackedSequences, batch_indices, order
from engine.data.text import gzip_bits_per_byte, read_corpus
from engine.data.text_dataset import TextDataset, load_text_data
from engine.data.tokenizers import Tokenizer, load_tokenizer, train_bpe
from engine.errors import UserError
from engine.profile_retention import TextData

TOPICS = [topics[key] for key in sorted(topics)][:30]
BPE = train_bpe(TOPICS, 600)
ANY_TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("\n é漢🦊👩‍👩‍👧\u0301\u200d<|>"))
)


def one_line(raised: pytest.ExceptionInfo[UserError]) -> str:
    message = str(raised.value)
    assert message and "\n" not in message
    return message


def write_corpus(folder: Path, count: int = 12) -> list[str]:
    """Documents of quite different lengths, in files a.txt, b.txt, …"""
    folder.mkdir(parents=True, exist_ok=True)
    documents = [text[: 400 + 700 * (index % 4)] for index, text in enumerate(TOPICS[:count])]
    for index, text in enumerate(documents):
        (folder / f"{chr(97 + index)}.txt").write_text(text, encoding="utf-8")
    return documents


def load(data: TextData, cache: Path, vocab_size: int = 400, length: int = 32, seed: int = 0) -> TextDataset:
    return load_text_data(data, vocab_size, length, seed, cache)


# Tokenizers


@settings(max_examples=150, deadline=None)
@given(ANY_TEXT)
def test_bpe_round_trips_any_text(text: str) -> None:
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert BPE.encode_batch([text, text]) == [ids, ids]
    stream = BPE.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, BPE.vocab_size - 1)))
def test_stream_emits_what_decode_gives_for_any_ids(ids: list[int]) -> None:
    stream = BPE.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == BPE.decode(ids)


def test_stream_never_emits_half_a_character() -> None:
    stream = BPE.stream()
    pieces = [stream.push(token) for token in BPE.encode("a🦊漢é")]
    assert [piece for piece in pieces if piece] == ["a", "🦊", "漢", "é"]


def test_stream_of_a_vocabulary_that_is_not_byte_level(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Sequence(  # as in Llama 2's folder
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "</s>"], initial_alphabet=[], show_progress=False
    )
    backend.train_from_iterator(TOPICS[:3], trainer)
    description = json.loads(backend.to_str())
    vocabulary = description["model"]["vocab"]
    vocabulary.update({token: len(vocabulary) + index for index, token in enumerate(fallback)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([tokenizer.end_of_text]) == ""
    text = "two words and a 🦊 in the assert statement"
    stream = tokenizer.stream()
    ids = tokenizer.encode(text)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids) == text
    assert "🦊" in pieces and "\ufffd" not in "".join(pieces)


def test_special_tokens_in_text_are_plain_text() -> None:
    ids = BPE.encode("a<|endoftext|>b")
    assert BPE.end_of_text not in ids
    assert BPE.decode(ids) == "a<|endoftext|>b"
    assert BPE.decode([*BPE.encode("a"), BPE.end_of_text]) == "a"


def test_training_is_deterministic_and_bounded() -> None:
    assert train_bpe(iter(TOPICS), 600).digest == BPE.digest
    assert BPE.vocab_size == 600
    assert train_bpe(["ab"], 5000).vocab_size == 257


def test_auto_tokenizer_loads_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    BPE.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The `with` statement", "  indented\n\n\tand 🦊 é", TOPICS[1]):
        assert theirs.encode(text, add_special_tokens=False) == BPE.encode(text)
        assert theirs.decode(BPE.encode(text)) == text
    assert theirs.eos_token_id == BPE.end_of_text
    assert len(theirs) == BPE.vocab_size


def test_a_saved_folder_loads_again_and_saves_the_same(tmp_path: Path) -> None:
    BPE.save(tmp_path / "one")
    (tmp_path / "one" / "chat_template.jinja").write_text("{{ messages }}")
    loaded = load_tokenizer(tmp_path / "one")
    assert (loaded.digest, loaded.vocab_size, loaded.end_of_text) == (BPE.digest, BPE.vocab_size, BPE.end_of_text)
    loaded.save(tmp_path / "two")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]


def test_a_limit_in_the_folder_does_not_cut_documents(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str((_saved(tmp_path) / "tokenizer.json").read_text())
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(TOPICS[0]) == BPE.encode(TOPICS[0])


def test_end_of_text_comes_from_the_configuration(tmp_path: Path) -> None:
    config = {"eos_token": {"content": "a", "__type": "AddedToken"}}
    (_saved(tmp_path) / "tokenizer_config.json").write_text(json.dumps(config))
    assert [load_tokenizer(tmp_path).end_of_text] == BPE.encode("a")


def test_bad_tokenizer_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder.*tokenizer\.json") as raised:
        load_tokenizer(tmp_path / "absent")
    one_line(raised)
    with pytest.raises(UserError, match=r"has no tokenizer\.json") as raised:
        load_tokenizer(tmp_path)
    one_line(raised)
    (tmp_path / "tokenizer.json").write_text('{\n"version": 1}')
    with pytest.raises(UserError, match=r"not a tokenizer\.json") as raised:
        load_tokenizer(tmp_path)
    one_line(raised)
    _saved(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    description["added_tokens"] = []
    description["model"]["vocab"]["<oddend>"] = description["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"no end-of-text token.*eos_token") as raised:
        load_tokenizer(tmp_path)
    one_line(raised)


def _saved(folder: Path) -> Path:
    BPE.save(folder)
    return folder


# Reading and splitting


def test_folders_are_read_recursively_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "bee",
        "a/z.md": "zed",
        "a/rows.jsonl": '{"text": "one"}\n\n{"text": "two", "more": 3}\n',
        "empty.txt": "",
        ".hidden.txt": "no",
        ".git/c.txt": "no",
        "image.png": "no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    corpus = read_corpus(TextData(files=[str(tmp_path)], heldout_fraction=0.3), seed=1)
    assert Counter(corpus.train + corpus.heldout) == Counter(["bee", "one", "two", "zed"])
    assert corpus.train and corpus.heldout
    named = TextData(files=[str(tmp_path / "image.png"), str(tmp_path / "b.txt")])
    assert set(read_corpus(named, 0).train + read_corpus(named, 0).heldout) == {"no", "bee"}


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_document_split_holds_out_whole_documents_by_seed(tmp_path: Path, fraction: float) -> None:
    documents = write_corpus(tmp_path, 26)
    documents.append(documents[0])
    (tmp_path / "copy.txt").write_text(documents[0], encoding="utf-8")
    data = TextData(files=[str(tmp_path)], heldout_fraction=fraction)
    splits = [read_corpus(data, seed) for seed in range(5)]
    for split in splits:
        assert Counter(split.train + split.heldout) == Counter(documents)
        assert not set(split.train) & set(split.heldout)
        share = sum(map(len, split.heldout)) / sum(map(len, documents))
        assert abs(share - fraction) < 0.05
    assert read_corpus(data, 3) == splits[3]
    assert any(split != splits[0] for split in splits)


def test_tail_split_cuts_at_a_line_break(tmp_path: Path) -> None:
    documents = write_corpus(tmp_path, 7)
    corpus = read_corpus(TextData(files=[str(tmp_path)], split="tail", heldout_fraction=0.25), seed=0)
    whole = "".join(documents)
    assert "".join(corpus.train) + "".join(corpus.heldout) == whole
    assert corpus.train[-1].endswith("\n") or corpus.train[-1] in documents
    assert abs(sum(map(len, corpus.heldout)) / len(whole) - 0.25) < 0.05
    (tmp_path / "single").write_text("".join(f"line {n}\n" for n in range(100)))
    single = read_corpus(TextData(files=[str(tmp_path / "single")], split="tail"), seed=0)
    assert single.train[0].endswith("line 88\n") or single.train[0].endswith("line 89\n")
    assert single.heldout[0].endswith("line 99\n")


def test_heldout_files_replace_the_split(tmp_path: Path) -> None:
    documents = write_corpus(tmp_path / "train", 4)
    (tmp_path / "other.txt").write_text("held out")
    data = TextData(files=[str(tmp_path / "train")], heldout_files=[str(tmp_path / "other.txt")])
    corpus = read_corpus(data, 0)
    assert (corpus.train, corpus.heldout) == (documents, ["held out"])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("absent.txt", None, "absent.txt: no such file or folder"),
        ("empty.txt", b"", "empty.txt: the file is empty"),
        ("folder", {}, "folder: the folder holds no text; files are taken that end in"),
        ("hidden", {".a.txt": b"x", "b.png": b"x"}, "hidden: the folder holds no text"),
        ("latin.txt", b"one\ntwo\nna\xefve", "latin.txt: not UTF-8 text at line 3"),
        ("binary.bin", b"a\0b", "binary.bin: a binary file"),
        ("blank.txt", b" \n\t\n", "blank.txt: no text in it"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": ', "rows.jsonl: line 2: not valid JSON"),
        ("rows.jsonl", b'{"text": "a"}\n\n{"txet": "b"}', 'rows.jsonl: line 3: has no key "text"'),
        ("rows.jsonl", b'"text"', 'rows.jsonl: line 1: has no key "text"'),
        ("rows.jsonl", b'{"text": 5}', 'rows.jsonl: line 1: "text" is int, not a string'),
        ("rows.jsonl", b'{"text": "\\ud83e"}', 'rows.jsonl: line 1: "text" holds half of a surrogate pair'),
        ("one.txt", b"a single document\n", "no line break where its tail could be held out"),
    ],
)
def test_bad_text_is_named_in_one_line(tmp_path: Path, name: str, content: Any, expected: str) -> None:
    path = tmp_path / name
    if isinstance(content, dict):
        path.mkdir()
        for inner, text in content.items():
            (path / inner).write_bytes(text)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load(TextData(files=[str(path)]), tmp_path / "cache")
    message = one_line(raised)
    assert message.startswith("data.") and expected in message


def test_splits_that_cannot_be_made(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("one long line without an end")
    with pytest.raises(UserError, match="no line break") as raised:
        read_corpus(TextData(files=[str(path)], split="tail"), 0)
    one_line(raised)
    path.write_text("some text\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n")
    with pytest.raises(UserError, match="leaves no held-out text") as raised:
        read_corpus(TextData(files=[str(path)], split="tail", heldout_fraction=0.2), 0)
    one_line(raised)
    with pytest.raises(UserError, match=r"is in data\.files too") as raised:
        read_corpus(TextData(files=[str(tmp_path)], heldout_files=[str(path)]), 0)
    one_line(raised)
    with pytest.raises(ValueError, match="brings its own held-out text"):
        TextData(builtin="python-docs", heldout_files=[str(path)])


def test_of_one_document_the_tail_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {number}\n" for number in range(100)))
    corpus = read_corpus(TextData(files=[str(path)]), 0)
    assert corpus.train[0] + corpus.heldout[0] == path.read_text()
    assert 5 <= len(corpus.heldout[0].splitlines()) <= 15


# The built-in text


@pytest.fixture(scope="module")
def docs() -> tuple[list[str], list[str]]:
    return python_docs.python_docs()


def test_python_docs_holds_out_the_last_tenth_of_the_topics(docs: tuple[list[str], list[str]]) -> None:
    train, heldout = docs
    keys = sorted(topics)
    assert heldout == [topics[key] for key in keys[-len(heldout) :]]
    share = sum(map(len, heldout)) / sum(map(len, topics.values()))
    assert 0.08 < share < 0.12
    assert sum(map(len, train)) > 1_500_000
    assert any("JSON (JavaScript Object Notation) <https://json.org> is a subset" in text for text in train)
    assert len(set(train)) == len(train)
    # No long line of held-out text is left in the training text, however it is indented.
    training_lines = {" ".join(line.split()) for text in train for line in text.splitlines()}
    held_lines = {" ".join(line.split()) for text in heldout for line in text.splitlines()}
    shared = {line for line in held_lines & training_lines if len(re.sub(r"[^\w\s]{4,}", "", line)) >= 40}
    assert shared == set()


def test_python_docs_opens_quickly_the_second_time(tmp_path: Path, docs: tuple[list[str], list[str]]) -> None:
    data = TextData(builtin="python-docs")
    first = load(data, tmp_path, vocab_size=1000, length=256)
    entry = next(path for path in tmp_path.iterdir() if path.is_dir())
    built = (entry / "meta.json").stat().st_mtime_ns
    second = load(data, tmp_path, vocab_size=1000, length=256)
    assert (entry / "meta.json").stat().st_mtime_ns == built
    assert first.digest == second.digest
    assert second.heldout.bytes == sum(len(text.encode()) for text in docs[1])
    assert 1.8 < second.heldout_gzip_bits_per_byte < 2.5


def test_gzip_bits_per_byte_is_what_deflate_needs() -> None:
    texts = ["spam and eggs " * 40, "ünïcödé 🦊"]
    plain = "\n".join(texts).encode()
    deflate = zlib.compressobj(9, wbits=-15)
    compressed = len(deflate.compress(plain)) + len(deflate.flush()) + 18  # gzip's header and trailer
    assert gzip_bits_per_byte(texts) == pytest.approx(8 * compressed / (len(plain) - 1))


# Packing


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=8), st.integers(1, 40), st.booleans())
def test_rows_rebuild_the_stream(tmp_path_factory: Any, texts: list[str], length: int, keep_tail: bool) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    path = tmp_path_factory.mktemp("stream") / "tokens"
    packing.write_stream(path, texts, BPE)
    end = BPE.end_of_text
    expected = [end]
    for text in texts:
        expected += [*BPE.encode(text), end]
    stream = packing.open_stream(path, BPE.vocab_size)
    assert stream.tolist() == expected
    packed = PackedSequences(stream, length, packing.text_bytes(texts), end, keep_tail=keep_tail)
    rows, lengths = packed.batch(range(len(packed)))
    assert rows.shape == (len(packed), length + 1) and rows.dtype == np.int32
    assert (
        packed.tokens == lengths.sum() == (len(expected) - 1 if keep_tail else (len(expected) - 1) // length * length)
    )
    inputs = [token for row, count in zip(rows, lengths, strict=True) for token in row[:count].tolist()]
    targets = [token for row, count in zip(rows, lengths, strict=True) for token in row[1 : count + 1].tolist()]
    assert inputs == expected[: packed.tokens]
    assert targets == expected[1 : packed.tokens + 1]
    for row, count in zip(rows, lengths, strict=True):
        assert set(row[count + 1 :].tolist()) <= {end}
    with pytest.raises(IndexError):
        packed.batch([len(packed)])


def test_bits_per_byte_counts_every_byte_once(tmp_path: Path) -> None:
    """A unigram model's code length, summed over the rows, is that of the stream as a whole."""
    write_corpus(tmp_path / "text")
    data = load(TextData(files=[str(tmp_path / "text")]), tmp_path / "cache", length=33)
    corpus = read_corpus(TextData(files=[str(tmp_path / "text")]), 0)
    ids = [token for text in corpus.heldout for token in [*data.tokenizer.encode(text), data.tokenizer.end_of_text]]
    counts = Counter(ids)
    nats = {token: -math.log(count / len(ids)) for token, count in counts.items()}
    rows, lengths = data.heldout.batch(range(len(data.heldout)))
    total = sum(nats[token] for row, n in zip(rows, lengths, strict=True) for token in row[1 : n + 1].tolist())
    assert total == pytest.approx(sum(nats[token] for token in ids))
    assert data.heldout.tokens == len(ids)
    assert data.heldout.bytes == len("".join(corpus.heldout).encode())


def test_large_vocabularies_take_four_bytes_a_token() -> None:
    assert packing.stream_dtype(1 << 16).itemsize == 2
    assert packing.stream_dtype((1 << 16) + 1).itemsize == 4


# Order


@given(st.integers(1, 300), st.integers(0, 2**31 - 1), st.integers(0, 50))
def test_order_is_a_permutation_and_pure(n: int, seed: int, epoch: int) -> None:
    permutation = order(n, seed, epoch)
    assert sorted(permutation.tolist()) == list(range(n))
    order.cache_clear()
    assert np.array_equal(order(n, seed, epoch), permutation)


def test_order_stays_the_same_in_all_releases() -> None:
    assert order(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert not np.array_equal(order(100, 0, 0), order(100, 0, 1))
    assert not np.array_equal(order(100, 0, 0), order(100, 1, 0))


@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 9))
def test_steps_run_through_epoch_after_epoch(n: int, batch_size: int, seed: int) -> None:
    steps = [batch_indices(n, batch_size, step, seed) for step in range(6)]
    assert all(len(indices) == batch_size for indices in steps)
    epochs = np.concatenate([order(n, seed, epoch) for epoch in range(6 * batch_size // n + 1)])
    assert np.array_equal(np.concatenate(steps), epochs[: 6 * batch_size])
    assert np.array_equal(batch_indices(n, batch_size, 4, seed), steps[4])


# The cache


def test_the_key_is_the_content(tmp_path: Path) -> None:
    write_corpus(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    cache = tmp_path / "cache"
    first = load(TextData(files=[str(tmp_path / "here")]), cache)
    moved = load(TextData(files=[str(tmp_path / "there")]), cache)
    assert moved.digest == first.digest and _entries(cache) == 1
    (tmp_path / "there" / "a.txt").write_text("another beginning of a document " * 20)
    assert load(TextData(files=[str(tmp_path / "there")]), cache).digest != first.digest
    data = TextData(files=[str(tmp_path / "here")])
    for other in (load(data, cache, vocab_size=300), load(data, cache, length=16), load(data, cache, seed=1)):
        assert other.digest != first.digest
    assert _entries(cache) == 5
    fresh = load(data, tmp_path / "other-cache")
    assert fresh.digest == first.digest
    assert np.array_equal(fresh.train.stream, first.train.stream)


@pytest.mark.parametrize("name", ["train.tokens", "heldout.tokens", "meta.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, name: str, damage: str) -> None:
    write_corpus(tmp_path / "text")
    data = TextData(files=[str(tmp_path / "text")])
    first = load(data, tmp_path / "cache")
    tokens = first.train.stream.tolist()
    entry = next(path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    content = (entry / name).read_bytes()
    if damage == "remove":
        (entry / name).unlink()
    else:
        middle = len(content) // 2
        broken = content[:middle] if damage == "truncate" else content[:middle] + b"\xff" + content[middle + 1 :]
        (entry / name).write_bytes(broken)
    again = load(data, tmp_path / "cache")
    assert again.digest == first.digest
    assert again.train.stream.tolist() == tokens
    assert (entry / name).read_bytes() == content
    assert not list((tmp_path / "cache").glob(".building-*"))


def test_two_processes_may_build_the_same_entry(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", 30)
    data = TextData(files=[str(tmp_path / "text")])
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        digests = pool.starmap(_digest_at, [(data, tmp_path / "cache")] * 4, chunksize=1)
    assert len(set(digests)) == 1 and _entries(tmp_path / "cache") == 1


def _digest_at(data: TextData, cache: Path) -> str:
    return load(data, cache, vocab_size=2000).digest


def test_the_cache_folder_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "text")
    monkeypatch.setenv("RETENTION_TUI_CACHE", str(tmp_path / "mine"))
    load_text_data(TextData(files=[str(tmp_path / "text")]), 400, 32, 0)
    assert _entries(tmp_path / "mine" / "data") == 1
    (tmp_path / "file").touch()
    monkeypatch.setenv("RETENTION_TUI_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="RETENTION_TUI_CACHE") as raised:
        load_text_data(TextData(files=[str(tmp_path / "text")]), 400, 32, 0)
    one_line(raised)


def test_text_shorter_than_a_sequence(tmp_path: Path) -> None:
    documents = write_corpus(tmp_path / "text", 3)
    data = TextData(files=[str(tmp_path / "text")])
    with pytest.raises(UserError, match=r"fewer than one sequence of train\.sequence_length = 5000") as raised:
        load(data, tmp_path / "cache", length=5000)
    fits = int(one_line(raised).rsplit(" ", 1)[1])
    assert fits < sum(map(len, documents))
    assert len(load(data, tmp_path / "cache", length=fits).train) == 1


def test_a_tokenizer_folder_must_fit_the_vocabulary(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    data = TextData(files=[str(tmp_path / "text")], tokenizer=str(_saved(tmp_path / "tokenizer")))
    with pytest.raises(UserError, match=r"600 tokens, more than model\.vocab_size = 500; .*at least 600") as raised:
        load(data, tmp_path / "cache", vocab_size=500)
    one_line(raised)
    dataset = load(data, tmp_path / "cache", vocab_size=600)
    assert isinstance(dataset.tokenizer, Tokenizer) and dataset.tokenizer.digest == BPE.digest


def _entries(cache: Path) -> int:
    return sum(1 for path in cache.iterdir() if path.is_dir())

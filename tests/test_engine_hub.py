"""Models and data sets of the hub: downloaded with progress, given up within a moment, gone on with, and kept."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
from hub_stand_in import HubStandIn, hub_stand_in
from huggingface_hub import constants
from tiny_llama import write_rows, write_tiny_llama

from engine.backend import mx
from engine.commands import Command, Stop
from engine.errors import UserError
from engine.events import Event, LoadingProgress
from engine.hub import fetch_dataset, fetch_model
from engine.loading import Interrupted, Loading
from engine.models.pretrained import load_base
from engine.profile_lora import PretrainedModel


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with hub_stand_in() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


@pytest.fixture
def model(hub: HubStandIn, tmp_path: Path) -> Path:
    """A model on the hub, `me/tiny`, with weights of three megabytes, code and a pickle."""
    folder = write_tiny_llama(tmp_path / "repository", width=256)
    for name in ("modeling.py", "pytorch_model.bin", "model.pkl"):
        (folder / name).write_text("import os")
    hub.repositories["models/me/tiny"] = {"main": folder}
    return folder


def fetch(name: str, revision: str | None = None) -> Path:
    return fetch_model(name, revision, Loading())


def told(name: str, revision: str | None = None) -> str:
    """What is said where it cannot be had."""
    with pytest.raises(UserError) as caught:
        fetch(name, revision)
    return str(caught.value)


def test_a_model_is_downloaded_without_code_and_then_taken_from_the_cache(hub: HubStandIn, model: Path) -> None:
    said: list[Event] = []
    base = load_base(PretrainedModel(init_from="me/tiny"), mx.float32, Loading(said.append))
    assert base.name == "me/tiny" and base.model(mx.array([[1, 2]])).shape == (1, 2, base.config["vocab_size"])
    present = {path.name for path in base.folder.iterdir()}
    assert present == {path.name for path in model.iterdir()} - {"modeling.py", "pytorch_model.bin", "model.pkl"}
    assert not any(word in path for path in hub.requested for word in (".py", ".bin", ".pkl"))
    size = (model / "model.safetensors").stat().st_size
    progress = [event for event in said if isinstance(event, LoadingProgress)]
    assert (progress[-1].what, progress[-1].unit) == ("downloading me/tiny", "bytes")
    assert progress[-1].done == progress[-1].total == size
    hub.close()
    assert fetch("me/tiny") == base.folder
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (base.folder / "model.safetensors.index.json").write_text(json.dumps(index))  # it is here in part
    line = told("me/tiny")
    assert "me/tiny is not on this machine" in line and f"{hub.address} cannot be reached" in line
    assert 'model.init_from = "~/models/tiny"' in line and "HF_HOME" in line


def _size(path: Path) -> int:
    return path.stat().st_size


def test_a_download_is_given_up_at_once_and_gone_on_with(hub: HubStandIn, model: Path, tmp_path: Path) -> None:
    inbox: SimpleQueue[Command] = SimpleQueue()
    asked: list[float] = []

    def say(event: Event) -> None:
        if isinstance(event, LoadingProgress) and event.done >= 1e6 and not asked:
            deadline = time.monotonic() + 10  # the first piece is told of a moment before it is written
            while time.monotonic() < deadline and not any(map(_size, tmp_path.glob("cache/*/blobs/*.partial"))):
                time.sleep(0.01)
            asked.append(time.monotonic())
            inbox.put(Stop("no more"))

    hub.bytes_a_second, hub.holds_at = 3e6, 2_500_000  # so it does not end before it is given up
    with pytest.raises(Interrupted, match="no more"):
        fetch_model("me/tiny", None, Loading(say, inbox))
    assert time.monotonic() - asked[0] < 3
    (partial,) = tmp_path.glob("cache/*/blobs/*.partial")
    arrived = partial.stat().st_size
    assert 0 < arrived < (model / "model.safetensors").stat().st_size
    hub.bytes_a_second = hub.holds_at = math.inf
    folder = fetch("me/tiny")
    assert hub.ranges == [f"bytes={arrived}-"]
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob("cache/*/blobs/*.partial"))


def test_what_arrived_damaged_is_not_kept(hub: HubStandIn, model: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "cache" / "models--me--tiny" / "blobs"
    blobs.mkdir(parents=True)
    digest = next(entry["lfs"]["oid"] for entry in hub.entries(model) if "lfs" in entry)
    (blobs / f"{digest}.partial").write_bytes(bytes(1000))
    assert "does not have its checksum" in told("me/tiny")
    assert not list(blobs.iterdir())


def test_what_cannot_be_had_is_told_with_what_to_do(hub: HubStandIn, model: Path) -> None:
    hub.repositories["models/me/gated"] = {"main": model}
    hub.gated.add("models/me/gated")
    assert re.search(f"accept them at {hub.address}/me/gated, .* hf auth login", told("me/gated"))
    assert "no such folder, and no such model on the hub" in told("me/nobody")
    assert "model.revision = 'v9': me/tiny has no such branch" in told("me/tiny", "v9")
    assert "neither a folder nor a name on the hub" in told("me/a name")


def test_a_cache_that_cannot_be_written_is_told(
    hub: HubStandIn, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    assert re.search("cannot be downloaded to .*set HF_HOME", told("me/tiny"))


def test_data_sets_come_as_the_hubs_own_parquet_or_as_their_authors(hub: HubStandIn, tmp_path: Path) -> None:
    converted, plain = tmp_path / "converted", tmp_path / "plain"
    for name in ("default/train/0000", "default/train/0001", "default/test/0000", "small/train/0000"):
        (converted / name).parent.mkdir(parents=True, exist_ok=True)
        (converted / f"{name}.parquet").write_text(name)
    write_rows(plain, 3)
    (plain / "load.py").write_text("import os")
    hub.repositories["datasets/me/rows"] = {"main": plain, "refs/convert/parquet": converted}
    hub.repositories["datasets/me/lines"] = {"main": plain}
    files = fetch_dataset("me/rows", "default", "train", Loading())
    assert [path.read_text() for path in files] == ["default/train/0000", "default/train/0001"]
    (lines,) = fetch_dataset("me/lines", "default", "train", Loading())
    assert lines.read_text() == (plain / "train.jsonl").read_text()
    for config, split, told in (
        ("default", "validation", "data.split = 'validation' is not in it; it has test, train"),
        ("large", "train", "data.dataset_config = 'large' is not in it; it has default, small"),
    ):
        with pytest.raises(UserError, match=told):
            fetch_dataset("me/rows", config, split, Loading())
    hub.close()
    assert fetch_dataset("me/rows", "default", "train", Loading()) == files
    assert fetch_dataset("me/lines", "default", "train", Loading()) == [lines]

"""What a run has learned as a model of its own: fused, exported and spoken with, also through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import write_rows, write_tiny_llama
from typer.testing import CliRunner

from engine.backend import mx
from engine.checkpoint import save_checkpoint
from engine.commands import Generate
from engine.data.tokenizers import train_bpe
from engine.errors import UserError
from engine.fuse import export_adapters, fuse
from engine.loading import Loading
from engine.models.adapters import adapter_config, attach, save_adapter
from engine.models.pretrained import load_base
from engine.models.retention_lm import RetentionLM, RetentionLMConfig
from engine.profile_lora import Adapter, PretrainedModel
from engine.runs import create_run
from engine.speaker import continue_text
from engine.store import RunDirectory
from engine.tasks import retention_lm
from retention_tui.cli import cli

import mlx_lm
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.utils import dequantize_model, load_model, quantize_model

TOKENS = mx.array([[5, 17, 200, 9, 31]])
QUESTION = Generate("a", "What is a lambda?", max_tokens=12, temperature=0)
Make = Callable[..., RunDirectory]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def make(runs: Path, tmp_path: Path) -> Make:
    """`make(base, method="dora", quantize_bits=4)`: a run with checkpoints 1 (the best) and 2, made by hand."""

    def go(base: Path, method: str = "lora", **model: Any) -> RunDirectory:
        table = {
            "kind": "lora",
            "model": {"init_from": str(base), **model},
            "adapter": {"method": method, "rank": 4, "alpha": 8},
            "data": {"files": [str(write_rows(tmp_path / "rows", 4))]},
            "train": {"steps": 2},
        }
        run = create_run(runs, "taught", {"profile": table})
        adapter = Adapter(**table["adapter"])
        loaded = load_base(PretrainedModel(**table["model"]), mx.float32, Loading())
        attach(loaded.model, adapter, 0)
        config = adapter_config(adapter, loaded.model, loaded.name)
        for step, val_loss in ((1, 2.0), (2, 3.0)):
            mx.random.seed(step)
            fresh = loaded.model.trainable_parameters()
            weights = tree_map(lambda array: array + 0.3 * mx.random.normal(array.shape), fresh)
            state = {"val_loss": val_loss}
            save_checkpoint(run, step, 1, lambda folder, w=weights: save_adapter(folder, w, config), {}, state)
        return run

    return go


def checkpoint(run: RunDirectory, step: int) -> Path:
    return run.checkpoints_path / f"step-{step:07d}"


def quiet(text: str) -> None: ...


def said(runs: Path, name: str | Path, which: str = "best") -> str:
    return "".join(continue_text(runs, str(name), which, QUESTION, quiet))


def said_by_mlx_lm(folder: Path, adapter: Path | None = None) -> str:
    model, tokenizer = mlx_lm.load(str(folder), adapter_path=None if adapter is None else str(adapter))
    messages = [{"role": "user", "content": QUESTION.prompt}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return str(mlx_lm.generate(model, tokenizer, prompt, max_tokens=QUESTION.max_tokens))


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_a_fused_folder_computes_what_base_and_adapter_do(
    make: Make, runs: Path, tmp_path: Path, tiny_llama: Path, method: str
) -> None:
    run = make(tiny_llama, method)
    fuse(runs, run.name, tmp_path / "out" / "fused", quiet)
    fused, config = load_model(tmp_path / "out" / "fused")
    together, _ = mlx_lm.load(str(tiny_llama), adapter_path=str(checkpoint(run, 1)))
    assert mx.allclose(fused(TOKENS), together(TOKENS), rtol=1e-4, atol=1e-4)
    assert config["vocab_size"] == 320 and not any("lora" in name for name, _ in tree_flatten(fused.parameters()))
    newest, _ = mlx_lm.load(str(tiny_llama), adapter_path=str(checkpoint(run, 2)))
    assert not mx.allclose(fused(TOKENS), newest(TOKENS), rtol=1e-4, atol=1e-4)
    assert said_by_mlx_lm(tmp_path / "out" / "fused") == said(runs, run.name) == said(runs, tmp_path / "out" / "fused")
    with pytest.raises(UserError, match="is a model's folder without an adapter: there is nothing to fuse"):
        fuse(runs, str(tmp_path / "out" / "fused"), tmp_path / "out" / "again", quiet)
    with pytest.raises(UserError, match="is a model's folder: it has no adapters"):
        export_adapters(runs, str(tmp_path / "out" / "fused"), tmp_path / "out" / "again", quiet)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fused"]


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_quantized_base_stays_quantized_unless_it_is_asked_for(
    make: Make, runs: Path, tmp_path: Path, dequantize: bool
) -> None:
    base = write_tiny_llama(tmp_path / "m", width=64)
    run = make(base, quantize_bits=4, quantize_group_size=32)
    fuse(runs, run.name, tmp_path / "fused", quiet, checkpoint="2", dequantize=dequantize)
    ours, config = load_model(tmp_path / "fused")
    # mlx-lm's own steps: convert, put the adapter on, fuse
    theirs, their_config = mlx_lm.load(str(base), return_config=True)[::2]
    theirs, their_config = quantize_model(theirs, their_config, 32, 4)
    mlx_lm.utils.load_adapters(theirs, str(checkpoint(run, 2)))
    whole = [(name, m.fuse(dequantize=dequantize)) for name, m in theirs.named_modules() if hasattr(m, "fuse")]
    theirs.update_modules(tree_unflatten(whole))
    if dequantize:
        dequantize_model(theirs)
    assert config.get("quantization") == (None if dequantize else their_config["quantization"])
    expected = dict(tree_flatten(theirs.parameters()))
    found = dict(tree_flatten(ours.parameters()))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)


def test_gguf_is_written_where_mlx_lm_can(make: Make, runs: Path, tmp_path: Path, tiny_llama: Path) -> None:
    fuse(runs, make(tiny_llama).name, tmp_path / "fused", quiet, gguf=True)
    weights, metadata = mx.load(str(tmp_path / "fused" / "model-f16.gguf"), return_metadata=True)
    assert int(metadata["llama.block_count"].item()) == 2 and weights["token_embd.weight"].shape == (320, 32)
    qwen = make(write_tiny_llama(tmp_path / "qwen", model_type="qwen2"))
    packed = make(write_tiny_llama(tmp_path / "wide", width=64), quantize_bits=4)
    on_load = r"wide is quantized when it is loaded \(model.quantize_bits = 4\), and GGUF is written in 16 bits"
    for run, told in ((qwen, "is of type 'qwen2'"), (packed, on_load)):
        with pytest.raises(UserError, match=told):
            fuse(runs, run.name, tmp_path / "not", quiet, gguf=True)
        assert not list(tmp_path.glob("*not*"))


def test_what_is_there_is_never_written_over(make: Make, runs: Path, tmp_path: Path, tiny_llama: Path) -> None:
    run = make(tiny_llama)
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(UserError, match="exists already; give a name that is free"):
            fuse(runs, run.name, taken, quiet)
        with pytest.raises(UserError, match="exists already; give a name that is free"):
            export_adapters(runs, run.name, taken, quiet)
    with pytest.raises(UserError, match="cannot be written: "):
        export_adapters(runs, run.name, tmp_path / "file" / "in", quiet)
    assert (tmp_path / "file").read_text() == "mine" and not list((tmp_path / "mine").iterdir())


def test_a_run_that_trains_whole_models_has_nothing_to_fuse(runs: Path, tmp_path: Path) -> None:
    run = create_run(runs, "pretrained", {"profile": {"kind": "retention-lm"}})
    save_checkpoint(run, 1, 1, lambda folder: (folder / "config.json").write_text("{}"), {}, {})
    with pytest.raises(UserError, match="pretrained has no adapter to fuse"):
        fuse(runs, run.name, tmp_path / "fused", quiet)
    with pytest.raises(UserError, match="pretrained has no adapters: its checkpoints are whole models"):
        export_adapters(runs, run.name, tmp_path / "adapters", quiet)


def test_adapters_are_exported_as_mlx_lm_lays_them_out(
    make: Make, runs: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    run = make(tiny_llama)
    export_adapters(runs, run.name, tmp_path / "adapters", quiet)
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapters").iterdir()}
    first, second = ((checkpoint(run, step) / "adapters.safetensors").read_bytes() for step in (1, 2))
    assert files.pop("adapter_config.json") == (checkpoint(run, 1) / "adapter_config.json").read_bytes()
    assert files == {
        "adapters.safetensors": first,
        "0000001_adapters.safetensors": first,
        "0000002_adapters.safetensors": second,
    }
    reported: list[str] = []
    (checkpoint(run, 2) / "adapters.safetensors").write_bytes(b"spoiled")
    export_adapters(runs, run.name, tmp_path / "again", reported.append)
    assert "step-0000002 is damaged" in reported[0]
    assert not (tmp_path / "again" / "0000002_adapters.safetensors").exists()


def test_any_adapters_folder_is_spoken_with(make: Make, runs: Path, tmp_path: Path, tiny_llama: Path) -> None:
    run = make(tiny_llama)
    expected = said_by_mlx_lm(tiny_llama, checkpoint(run, 1))
    assert expected == said(runs, run.name) == said(runs, checkpoint(run, 1))
    theirs = shutil.copytree(checkpoint(run, 1), tmp_path / "theirs")
    assert said(runs, theirs) == expected
    config = json.loads((theirs / "adapter_config.json").read_text())
    (theirs / "adapter_config.json").write_text(json.dumps(config | {"model": None}))
    with pytest.raises(UserError, match="model, the base that it was trained on, is missing"):
        said(runs, theirs)
    with pytest.raises(UserError, match="run 'nothing' is not in"):
        said(runs, "nothing")


def test_a_folder_of_a_model_that_was_trained_here_is_spoken_with(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    tokenizer = train_bpe(["What is a lambda? It is what def is, without a name."], 270)
    tokenizer.save(folder)
    mx.random.seed(0)
    RetentionLM(RetentionLMConfig(width=32, layers=1, heads=2, vocab_size=tokenizer.vocab_size)).save(folder)
    expected = "".join(piece for piece in retention_lm.speak(*retention_lm.load_speaker(folder), QUESTION) if piece)
    assert expected and said(runs, folder) == expected


def test_the_command_line_fuses_exports_and_speaks(
    make: Make, runs: Path, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETENTION_TUI_RUNS", str(runs))
    run = make(tiny_llama)

    def command(*arguments: str | Path) -> str:
        done = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    asked = ["-p", QUESTION.prompt, "--temperature", "0", "--max-tokens", "12", "--checkpoint", "best"]
    answer = command("generate", run.name, *asked)
    assert answer.strip() and answer == f"{said(runs, run.name)}\n"
    assert command("fuse", run.name, "-o", tmp_path / "fused", "--gguf").strip() == str(tmp_path / "fused")
    assert (tmp_path / "fused" / "model-f16.gguf").is_file()
    adapters = tmp_path / "adapters"
    assert command("export", run.name, "--format", "adapters", "-o", adapters).strip() == str(adapters)
    assert command("generate", tmp_path / "adapters", *asked[:-2]) == answer
    with pytest.raises(UserError, match="needs -o"):
        command("export", run.name, "--format", "adapters")

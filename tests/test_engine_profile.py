"""Profiles: what ships is valid, and every mistake is answered by one line that names the key and the remedy."""

from __future__ import annotations

from pathlib import Path

import annotated_types
import pytest
from pydantic import BaseModel

from engine.errors import UserError
from engine.profile import LoRAProfile, Profile, RetentionProfile
from engine.profile_files import (
    find_profile,
    list_profiles,
    load_profile,
    own_folder,
    shipped_folder,
    validate_profile,
)

SIZES = {  # width, layers, vocabulary, parameters
    "retention-ultra-tiny": (64, 3, 1_000, 0.22e6),
    "retention-tiny": (256, 6, 50_257, 17e6),
    "retention-small": (768, 12, 50_257, 124e6),
    "retention-medium": (1024, 24, 50_257, 353e6),
    "retention-large": (1280, 36, 50_257, 774e6),
    "retention-7b": (4096, 32, 50_257, 7e9),
}

MINIMAL = """
kind = "retention-lm"
[data]
builtin = "python-docs"
[train]
steps = 10
"""


@pytest.fixture(autouse=True)
def own_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of the user's own profiles, so that this machine's cannot matter."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("RETENTION_TUI_PROFILES", str(folder))
    return folder


def write(folder: Path, text: str, name: str = "mine.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(path: str, *overrides: str) -> str:
    """The one line that refuses a profile."""
    with pytest.raises(UserError) as caught:
        load_profile(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", sorted(shipped_folder().glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_profiles_are_valid_and_described(path: Path) -> None:
    profile = load_profile(path.stem)
    assert profile.description
    if isinstance(profile, RetentionProfile):
        assert profile.model.width // profile.model.heads in (32, 64)
    assert profile.train.batch_size % (profile.train.at_once or 1) == 0
    assert profile.train.warmup_steps < (profile.train.steps or 10**9)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    model = load_profile(name).model
    width, layers, vocabulary, parameters = SIZES[name]
    assert (model.width, model.layers, model.vocab_size) == (width, layers, vocabulary)
    blocks = 12 * width**2 * layers  # attention 4, SwiGLU 3 · 8/3
    assert blocks + vocabulary * width == pytest.approx(parameters, rel=0.08)


def test_every_field_is_described_and_every_number_has_a_range() -> None:
    def check(model: type[BaseModel], prefix: str = "") -> int:
        fields = 0
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                fields += check(field.annotation, f"{prefix}{name}.")
                continue
            fields += 1
            assert field.description, f"{prefix}{name} has no description"
            if str(field.annotation) in ("<class 'int'>", "<class 'float'>", "int | None", "float | None"):
                bounds = (annotated_types.Ge, annotated_types.Gt)
                assert any(isinstance(item, bounds) for item in field.metadata), f"{prefix}{name} has no range"
        return fields

    assert check(Profile) > 40


def test_units_are_told() -> None:
    schema = Profile.model_json_schema()
    assert schema["$defs"]["Train"]["properties"]["sequence_length"]["unit"] == "tokens"


class TestOverrides:
    def test_values_are_toml(self, tmp_path: Path) -> None:
        profile = load_profile(
            write(tmp_path, MINIMAL),
            [
                "train.steps=50",
                "train.learning_rate = 3e-4",
                "train.gradient_checkpointing=true",
                'description="a = b"',
            ],
        )
        assert profile.train.steps == 50
        assert profile.train.learning_rate == 3e-4
        assert profile.train.gradient_checkpointing is True
        assert profile.description == "a = b"

    def test_a_bare_word_is_a_string(self, tmp_path: Path) -> None:
        assert load_profile(write(tmp_path, MINIMAL), ["train.schedule=linear"]).train.schedule == "linear"

    def test_the_last_one_counts(self, tmp_path: Path) -> None:
        assert load_profile(write(tmp_path, MINIMAL), ["train.steps=5", "train.steps=7"]).train.steps == 7

    def test_a_new_length_takes_the_place_of_the_old_one(self, tmp_path: Path) -> None:
        train = load_profile(write(tmp_path, MINIMAL), ["train.tokens=1000000"]).train
        assert (train.steps, train.tokens) == (None, 1_000_000)

    def test_own_files_take_the_place_of_the_builtin_text(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        data = load_profile("retention-tiny", ['data.files=["a.txt"]', "data.heldout_files=b.txt"]).data
        assert (data.builtin, data.files, data.heldout_files) == (None, [str(here / "a.txt")], [str(here / "b.txt")])

    @pytest.mark.parametrize("bad", ["train.steps", "=5", "train.=5", ".steps=5", ""])
    def test_not_key_value(self, tmp_path: Path, bad: str) -> None:
        assert "give it as KEY=VALUE" in refusal(write(tmp_path, MINIMAL), bad)

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("train.stepz=5", "train.stepz is not known; did you mean 'steps'?"),
            ("trian.steps=5", "trian is not known; did you mean 'train'?"),
            ("steps=5", "steps is not known; did you mean 'train.steps'?"),
            ("model.learning_rate=5", "model.learning_rate is not known; did you mean 'train.learning_rate'?"),
            ("validation.every=5", "validation is not known; did you mean 'validate'?"),
            ("train.steps.more=5", "train.steps: should be a whole number"),
            ("train.steps=0", "train.steps = 0: should be greater than or equal to 1"),
            ("train.steps=1.5", "train.steps = 1.5: should be a whole number"),
            ("train.steps=many", "train.steps = 'many': should be a whole number"),
            ("train.steps=true", "train.steps = true: should not be true or false"),
            ("train.learning_rate=nan", "train.learning_rate = nan: should be a finite number"),
            ("train.learning_rate=[1]", "train.learning_rate = [1]: should be a number"),
            ("train.gradient_checkpointing=5", "train.gradient_checkpointing = 5: should be true or false"),
            (
                "train.schedule=sine",
                "train.schedule = 'sine': should be 'cosine', 'linear', 'constant', 'exponential' or 'step'",
            ),
            (
                "train.micro_batch_size=some",
                "train.micro_batch_size = 'some': should be a whole number of at least 1, or \"auto\"",
            ),
            ("kind=retention", "kind = 'retention': should be 'retention-lm' or 'lora'"),
            ("train=5", "train = 5: should be a table"),
            ("data.files=5", "data.files = 5: should be a list"),
            ('data.files=["a", 5]', "data.files[1] = 5: should be a string"),
            ("description=5", "description = 5: should be a string"),
            ("model.power=3", "model.power = 3: should be 1, 2 or 4"),
            ("model.heads=3", "model: heads = 3 does not divide width = 256"),
            ("model.kv_heads=3", "model: kv_heads = 3 does not divide heads = 8"),
            ("train.micro_batch_size=64", "train: micro_batch_size = 64 is larger than batch_size = 32"),
            ("data.heldout_fraction=1", "data.heldout_fraction = 1: should be less than 1"),
            ("guard.stop_at=25:00", "guard.stop_at = '25:00': should be a time of day like 07:00"),
            ("guard.red_seconds=5", "guard.red_seconds is not known; did you mean 'guard.memory.red_seconds'?"),
            (
                "guard.memory.patience=5",
                "guard.memory.patience is not known; did you mean 'guard.early_stopping.patience'?",
            ),
        ],
    )
    def test_what_is_wrong_and_what_would_be_right(self, tmp_path: Path, override: str, expected: str) -> None:
        assert refusal(write(tmp_path, MINIMAL), override) == f"mine.toml: {expected}"


def test_a_run_of_the_first_release_keeps_its_guard(tmp_path: Path) -> None:
    profile = load_profile(str(write(tmp_path, MINIMAL + "[guard]\nnan_steps = 5\n")))
    assert (profile.guard.divergence.skips, profile.guard.divergence.rollbacks) == (4, 0)


class TestFiles:
    def test_no_profile_of_that_name(self) -> None:
        with pytest.raises(UserError, match="did you mean 'retention-tiny'"):
            find_profile("retention-tny")

    @pytest.mark.parametrize("name", ["nowhere.toml", "./nowhere", "."])
    def test_no_such_file(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError):
            find_profile(name)

    def test_syntax_error(self, tmp_path: Path) -> None:
        message = refusal(write(tmp_path, "kind = \n"))
        assert "mine.toml: not valid TOML" in message
        assert "line 1" in message

    def test_not_text(self, tmp_path: Path) -> None:
        (tmp_path / "mine.toml").write_bytes(b"kind = \xff\xfe")
        assert "not UTF-8 text" in refusal(str(tmp_path / "mine.toml"))

    def test_a_byte_order_mark_does_no_harm(self, tmp_path: Path) -> None:
        (tmp_path / "mine.toml").write_text(MINIMAL, encoding="utf-8-sig")
        assert load_profile(str(tmp_path / "mine.toml")).train.steps == 10

    def test_missing_parts(self, tmp_path: Path) -> None:
        assert refusal(write(tmp_path, "")) == "mine.toml: kind is missing (and 2 more)"

    @pytest.mark.parametrize("train", ["", "steps = 5\nepochs = 1", "steps = 1\nepochs = 1\ntokens = 1"])
    def test_exactly_one_length(self, tmp_path: Path, train: str) -> None:
        text = MINIMAL.replace("steps = 10", train)
        assert "exactly one of steps, epochs and tokens" in refusal(write(tmp_path, text))

    @pytest.mark.parametrize("data", ["", 'builtin = "python-docs"\nfiles = ["a.txt"]', "files = []"])
    def test_exactly_one_source(self, tmp_path: Path, data: str) -> None:
        text = MINIMAL.replace('builtin = "python-docs"', data)
        assert "exactly one of builtin and files" in refusal(write(tmp_path, text))

    def test_paths_are_relative_to_the_profile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        text = MINIMAL.replace('builtin = "python-docs"', 'files = ["text/a.txt", "/b.txt"]\ntokenizer = "tok"')
        profile = load_profile(write(tmp_path, text + '\n[model]\ninit_from = "../other/checkpoint"'))
        assert profile.data.files == [str(tmp_path / "text/a.txt"), "/b.txt"]
        assert profile.data.tokenizer == str(tmp_path / "tok")
        assert profile.model.init_from == str(tmp_path.parent / "other/checkpoint")

    def test_the_name_of_a_run_is_no_path(self, tmp_path: Path) -> None:
        assert load_profile(write(tmp_path, MINIMAL), ["model.init_from=demo-2"]).model.init_from == "demo-2"

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/somewhere")
        assert load_profile(write(tmp_path, MINIMAL), ["data.files=~/a.txt"]).data.files == ["/somewhere/a.txt"]

    def test_a_resolved_profile_is_valid_again(self, tmp_path: Path) -> None:
        profile = load_profile(write(tmp_path, MINIMAL))
        assert validate_profile(profile.model_dump(by_alias=True), where="run.json") == profile


class TestExtends:
    def test_one_level(self, tmp_path: Path) -> None:
        write(tmp_path, MINIMAL + "batch_size = 4\n[model]\nwidth = 64\nheads = 2", "base.toml")
        profile = load_profile(write(tmp_path, 'extends = "base"\n[train]\nepochs = 2\n[model]\nlayers = 1'))
        assert (profile.train.steps, profile.train.epochs, profile.train.batch_size) == (None, 2, 4)
        assert (profile.model.width, profile.model.layers) == (64, 1)

    def test_two_levels_are_refused(self, tmp_path: Path) -> None:
        write(tmp_path, MINIMAL, "first.toml")
        write(tmp_path, 'extends = "first"', "second.toml")
        assert "mine.toml: extends 'second', which extends another" in refusal(write(tmp_path, 'extends = "second"'))

    def test_unknown(self, tmp_path: Path) -> None:
        message = refusal(write(tmp_path, 'extends = "retention-tinny"'))
        assert message == "mine.toml: extends 'retention-tinny', which is not known; did you mean 'retention-tiny'?"

    def test_itself(self, tmp_path: Path) -> None:
        assert "extends 'mine', which is not known" in refusal(write(tmp_path, 'extends = "mine"'))

    def test_paths_of_the_base_are_relative_to_the_base(self, own_profiles: Path, tmp_path: Path) -> None:
        write(own_profiles, MINIMAL.replace('builtin = "python-docs"', 'files = ["a.txt"]'), "base.toml")
        profile = load_profile(write(tmp_path, 'extends = "base"\n[data]\nheldout_files = ["b.txt"]'))
        assert profile.data.files == [str(own_profiles / "a.txt")]
        assert profile.data.heldout_files == [str(tmp_path / "b.txt")]

    def test_an_own_profile_may_extend_the_shipped_one_of_its_name(self, own_profiles: Path) -> None:
        write(own_profiles, 'extends = "retention-tiny"\n[train]\nsteps = 3', "retention-tiny.toml")
        profile = load_profile("retention-tiny")
        assert (profile.train.steps, profile.model.width) == (3, 256)


class TestList:
    def test_own_profiles_come_last_and_win(self, own_profiles: Path) -> None:
        assert own_folder() == own_profiles
        write(own_profiles, 'extends = "retention-tiny"\ndescription = "mine"', "a-small-one.toml")
        write(own_profiles, 'description = "broken', "broken.toml")
        profiles = {profile.name: profile for profile in list_profiles()}
        assert set(SIZES) < set(profiles)
        assert (profiles["a-small-one"].kind, profiles["a-small-one"].description) == ("retention-lm", "mine")
        assert profiles["a-small-one"].own and not profiles["retention-tiny"].own
        assert "not valid TOML" in profiles["broken"].description


def test_a_bases_folder_is_found_from_elsewhere_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    loaded = [load_profile("lora-demo", [f"model.init_from={name}"]) for name in ("models/mine", "models/theirs")]
    bases = [profile.model.init_from for profile in loaded if isinstance(profile, LoRAProfile)]
    assert bases == [str(tmp_path / "models" / "mine"), "models/theirs"]  # what is not here is a name on the hub

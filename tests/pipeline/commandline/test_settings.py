"""Options and settings as one set: none is dropped silently, and a setting reaches those that it is meant for."""

import json
import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from kdcache.cache.errors import InputError
from kdcache.cli import main
from kdcache.pipeline.commandline.commands import known_options
from kdcache.pipeline.commandline.parameters import options_of
from kdcache.pipeline.commandline.settings import KnownOption, load_settings

COMMANDS = main.commands
KNOWN = known_options(COMMANDS)
OPTIONS = [(name, p) for name, command in COMMANDS.items() for p in options_of(command)]
# Options of one name that are described in other words from command to command, and yet mean the same.
SAME_MEANING = {
    "teacher",
    "data",
    "epochs",
    "seed",
    "teacher-size",
    "teacher-interpolation",
    "amp",
    "views",
    "unlabelled",
    "compile",
    "allow-low-accuracy",
    "registry",  # of rm and gc only where it is typed
    "loss",
    "topk",
    "temperatures",
    "precision",
}
# Those that mean something else in these commands, which no setting for all commands reaches.
OWN = {
    *(
        (c, "out")
        for c in ("views", "plan", "build", "pack", "unpack", "mix", "train", "import", "pull", "demo", "bench")
    ),
    *((command, "out") for command in ("export", "report")),
    *((command, "views") for command in ("views", "pack", "push", "pull")),
    *((command, "name") for command in ("push", "rm")),
    ("views", "samples"),
    *((command, "batch-size") for command in ("plan", "build")),
    *(("eval", name) for name in ("cache", "data", "student", "teacher", "predictions", "train-images")),
    *(("export", name) for name in ("data", "images", "student", "to")),
    ("report", "data"),
    ("plan", "samples"),
    ("import", "image-size"),
    ("import", "teacher"),
    ("mix", "weights"),
    ("verify", "teacher"),
    ("pull", "teacher"),
    ("pull", "replay"),
}


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("KDCACHE_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def flag(p: click.Option) -> str:
    return p.opts[0].removeprefix("--")


def invoke(*args: str, **env: str) -> Result:
    return CliRunner().invoke(main, args, env=env, catch_exceptions=False)


def found(toml: str = "", **env: str) -> dict[str, dict[str, str]]:
    """The settings of each command as the command line would get them."""
    Path("kdcache.toml").write_text(toml)
    settings = load_settings(KNOWN, env, Path("kdcache.toml"))
    return {command: {o: s.value for o, s in chosen.items()} for command, chosen in settings.items()}


def having(settings: dict[str, dict[str, str]], option: str) -> set[str]:
    return {command for command, chosen in settings.items() if option in chosen}


# Options that are given twice


@pytest.mark.parametrize(
    ("command", "p"), [(c, p) for c, p in OPTIONS if not (p.is_flag or p.multiple)], ids=lambda v: getattr(v, "name", v)
)
def test_an_option_given_twice_is_refused(command: str, p: click.Option) -> None:
    result = invoke(command, p.opts[0], "one", f"{p.opts[-1]}=two")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: {p.opts[0]} is given twice: one and two."
    assert "3 times: one, one and two." in invoke(command, *(p.opts[0], "one") * 2, p.opts[0], "two").stderr


def test_options_that_take_several() -> None:
    assert {(command, flag(p)) for command, p in OPTIONS if p.multiple} == {
        ("train", "cache"), ("train", "loss"), ("train", "seed"),
    }  # fmt: skip


def test_a_flag_given_twice_is_harmless_and_its_opposite_is_refused() -> None:
    assert json.loads(invoke("ls", "--json", "--json").stdout) == []
    for command in ("build", "train"):
        result = invoke(command, "--compile", "--teacher", "x", "--no-compile")
        assert result.exit_code == 2
        message = "Error: --compile and --no-compile contradict each other: give one."
        assert result.stderr.splitlines()[-1] == message


# Settings


def kind(p: click.Option) -> tuple[str, bool]:
    """What a value must be; not its bounds, nor which of the choices there are."""
    return p.type.name, p.is_flag


def test_options_of_one_name_mean_the_same_or_are_marked() -> None:
    assert {(command, flag(p)) for command, p in OPTIONS if p.spec.own} == OWN
    shared: dict[str, list[click.Option]] = {}
    for _, p in OPTIONS:
        if not p.spec.own:
            shared.setdefault(flag(p), []).append(p)
    for name, options in shared.items():
        # Text is what options that take several take, each a number or a name.
        kinds = {kind(p) for p in options if not p.multiple}
        assert len(kinds) <= 1, f"--{name} takes {kinds}: mark those of another meaning by own=True"
        words = {p.help for p in options}
        assert len(words) == 1 or name in SAME_MEANING, (
            f"--{name} is {words}: mark those of another meaning by own=True"
        )


@pytest.mark.parametrize("name", sorted({flag(p) for _, p in OPTIONS}))
def test_a_setting_for_all_commands_reaches_those_of_its_meaning(name: str) -> None:
    """In the file and in the environment; a command's own table always does."""
    mine = {command for command, p in OPTIONS if flag(p) == name}
    meant = {command for command in mine if (command, name) not in OWN}
    variable = f"KDCACHE_{name.replace('-', '_').upper()}"
    if meant:
        assert having(found(f'{name} = "x"'), name) == meant == having(found(**{variable: "x"}), name)
    else:
        for settings in ({"toml": f'{name} = "x"'}, {variable: "x"}):
            with pytest.raises(InputError, match=f"{name} means something else in each of .*KDCACHE_[A-Z]+_"):
                found(**settings)
    for command in mine:
        in_file = found(f'[{command}]\n{name} = "y"')
        assert having(in_file, name) == {command}
        assert in_file == found(**{variable.replace("KDCACHE", f"KDCACHE_{command.upper()}"): "y"})


@pytest.mark.parametrize(
    ("toml", "option", "commands"),
    [
        ("views = 16", "views", {"plan", "build", "train", "bench"}),
        ('amp = "fp16"', "amp", {"train"}),
        ('amp = "bf16"', "amp", {"teach", "plan", "build", "train", "bench"}),
        ('amp = "int8"', "amp", {"teach", "plan", "build", "train", "bench"}),  # of none: refused where it is used
        ("seed = [0, 1]", "seed", {"train"}),
        ("seed = 1", "seed", {"teach", "views", "plan", "build", "train"}),
        ('loss = ["ce", "nkd"]', "loss", {"train"}),
        ('loss = "dkd:beta=2,warmup=5"', "loss", {"train", "bench"}),
        ('optimizer = "adamw"', "optimiser", {"train"}),
    ],
)
def test_values_that_only_some_commands_take(toml: str, option: str, commands: set[str]) -> None:
    assert having(found(toml), option) == commands
    key, value = toml.split(" = ")
    variable = f"KDCACHE_{key.upper()}"
    assert having(found(**{variable: value.strip('[]"').replace('", "', ",")}), option) == commands


def test_commands_run_beside_settings_of_other_commands() -> None:
    """views breaks no push, pull and pack, and amp = "fp16" no build; what is wrong everywhere names its origin."""
    Path("kdcache.toml").write_text('views = 16\namp = "fp16"\nseed = [0, 1]')
    for command in ("push", "pull", "pack"):
        result = invoke(command, "00000000", *(["--to", "hdf5"] if command == "pack" else ["--registry", "team"]))
        assert result.exit_code == 2 and "00000000" in result.stderr and "views" not in result.stderr
    result = invoke("build", "--teacher", "resnt8")
    assert "'resnt8'" in result.stderr.splitlines()[-1]
    result = invoke("train", KDCACHE_WEIGHTS="teacher.safetensors")  # which is for --online
    assert "no cache of digits" in result.stderr.splitlines()[-1]
    assert "from KDCACHE_AMP" in invoke("build", "--teacher", "resnet8", KDCACHE_AMP="int8").stderr
    assert "'0:16'" in (text := invoke("build", KDCACHE_VIEWS="0:16").stderr) and "from KDCACHE_VIEWS" in text


@pytest.mark.parametrize("table", ["", "[train]\n"])
@pytest.mark.parametrize(
    ("one", "other"), [('optimiser = "sgd"', 'optimizer = "adamw"'), ("batch-size = 8", "batch_size = 16")]
)
def test_a_setting_that_stands_twice_is_refused(table: str, one: str, other: str) -> None:
    with pytest.raises(InputError, match=other.split(" ")[0]) as e:
        found(f"{table}{one}\n{other}")
    assert one.split(" ")[0] in str(e.value)


def test_two_variables_of_one_setting_are_refused() -> None:
    for prefix in ("KDCACHE", "KDCACHE_TRAIN"):
        with pytest.raises(InputError, match=f"{prefix}_OPTIMIZER: the same stands in {prefix}_OPTIMISER"):
            found(**{f"{prefix}_OPTIMISER": "sgd", f"{prefix}_OPTIMIZER": "adamw"})


def test_a_variable_of_an_option_that_begins_with_a_commands_name() -> None:
    commands = {"train": {"lr": KnownOption("lr")}, "build": {"train-folder": KnownOption("train-folder")}}
    settings = load_settings(commands, {"KDCACHE_TRAIN_FOLDER": "a", "KDCACHE_TRAIN_LR": "1"}, Path("nowhere"))
    assert {c: {o: s.value for o, s in chosen.items()} for c, chosen in settings.items()} == {
        "train": {"lr": "1"},
        "build": {"train-folder": "a"},
    }
    with pytest.raises(InputError, match="KDCACHE_TRAIN_LRR: train has no such option: did you mean lr"):
        load_settings(commands, {"KDCACHE_TRAIN_LRR": "a"}, Path("nowhere"))


def test_optimizer_is_optimiser() -> None:
    for line in (["--optimizer", "adam"], ["--optimiser", "adam"]):
        assert "'adam'" in invoke("train", *line).stderr.splitlines()[-1]
    assert "from KDCACHE_OPTIMIZER" in invoke("train", KDCACHE_OPTIMIZER="adam").stderr

"""Settings in kdcache.toml and the environment: mistakes in them, and which comes first."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.tests.helpers.commands import Place, works


@pytest.mark.parametrize(
    ("toml", "parts"),
    [
        ("vews = 3", ("vews", "mean views?")),
        ("[build]\nvews = 3", ("[build] vews", "mean views?")),
        ("[biuld]\nviews = 3", ("[biuld]", "mean build?")),
        ("build = 3", ("build",)),
        ("views = ", ("not valid TOML",)),
        ('[build.augment]\nname = "crop"', ("[build] augment",)),
        ("data = 1979-05-27", ("data",)),
        ('views = "many"', ("'many'", "from kdcache.toml: views")),
        ("[build]\nviews = 2.5", ("'2.5'", "from kdcache.toml: [build] views")),
        ("views = [1, 2]", ("'1,2'",)),
        ("views = true", ("'true'",)),
        ("views = -1", ("-1",)),
        ("unlabelled = 3", ("'3'",)),
        ('precision = "float8"', ("'float8'", "float32")),
        ("augment = 3", ("'3'", "kdcache views --list")),
        ('temperatures = [1, "two"]', ("'1,two'",)),
    ],
)
def test_mistakes_in_the_settings_file(
    toml: str, parts: tuple[str, ...], data: str, refused: Callable[..., str]
) -> None:
    Path("kdcache.toml").write_text(toml)
    refused(f"build --teacher resnet8 {'' if toml.startswith('data') else data}", *parts)


def test_a_settings_file_that_is_no_text(place: Place, refused: Callable[..., str]) -> None:
    Path("kdcache.toml").write_bytes(b"\xff\xfe")
    refused("ls", "kdcache.toml", "not valid TOML")
    Path("kdcache.toml").unlink()
    Path("kdcache.toml").mkdir()
    refused("ls", "kdcache.toml")


@pytest.mark.parametrize(
    ("variable", "value", "parts"),
    [
        ("KDCACHE_VEWS", "3", ("mean views?",)),
        ("KDCACHE_BUILD_VEWS", "3", ("build", "mean views?")),
        ("KDCACHE_VIEWS", "many", ("'many'", "from KDCACHE_VIEWS")),
        ("KDCACHE_BUILD_VIEWS", "0", ("0", "from KDCACHE_BUILD_VIEWS")),
        ("KDCACHE_ALLOW_LOW_ACCURACY", "perhaps", ("'perhaps'",)),
        ("KDCACHE_DATA", "nowhere", ("'nowhere'",)),
    ],
)
def test_mistakes_in_the_environment(
    variable: str, value: str, parts: tuple[str, ...], refused: Callable[..., str]
) -> None:
    env = {variable: value}
    parts = (variable, *parts) if "VEWS" in variable else parts
    refused("build --teacher resnet8", *parts, **env)


def test_flags_come_before_the_environment_before_the_file(data: str, refused: Callable[..., str]) -> None:
    """Shown by which of several unknown policies the message names."""
    line, file = f"build --teacher resnet8 {data}", Path("kdcache.toml")
    file.write_text('augment = "top"')
    refused(line, "'top'")
    file.write_text('augment = "top"\n[build]\naugment = "table"\n[teach]\naugment = "other"')
    refused(line, "'table'")
    refused(line, "'all'", KDCACHE_AUGMENT="all")
    refused(line, "'build'", KDCACHE_AUGMENT="all", KDCACHE_BUILD_AUGMENT="build")
    refused(line, "'build'", KDCACHE_BUILD_AUGMENT="build", KDCACHE_AUGMENT="all")
    refused(line, "'table'", KDCACHE_AUGMENT="")
    refused(f"{line} --augment flag", "'flag'", KDCACHE_AUGMENT="all", KDCACHE_BUILD_AUGMENT="build")


def test_settings_do_what_flags_do(place: Place) -> None:
    Path("kdcache.toml").write_text(
        f'data = "imagefolder:{place.pics}"\n[build]\nteacher = "resnet8"\ntopk = 2\ntemperatures = [1, 2]\n'
        f'augment = ["crop", "flip"]\nfull-fingerprint = false\nout = "{place.top2}"\n'
    )
    built = json.loads(works("build", KDCACHE_BUILD_VIEWS="1", KDCACHE_JSON="1").stdout)
    assert built["teacher_images"] == 0 and built["path"] == str(place.top2)

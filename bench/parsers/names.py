"""Parsers of short texts: settings, view policies, networks, losses, datasets, caches and registries by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from damages import TOML, WORDS

from kdcache.cache.home import open_cache
from kdcache.cache.registry.registry import split_url
from kdcache.cli import main
from kdcache.pipeline.commandline.commands import known_options
from kdcache.pipeline.commandline.parameters import flag_of, options_of
from kdcache.pipeline.commandline.settings import load_settings
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.process.functions import names_code
from kdcache.pipeline.stores import open_store
from kdcache.pipeline.teachers.checkpoints import split_place
from kdcache.pipeline.teachers.networks import built_for, canonical_name, outline
from kdcache.pipeline.trust import stored_data, stored_network
from kdcache.pipeline.views.policy import NAMED, check_policy
from kdcache.tests.helpers.containers import write_csv, write_folder
from kdcache.train.losses.options import LOSSES, described, make_loss, spec_of
from kdcache.train.plan.resuming import place_of, placed
from parsers.caches import copied_cache
from parsers.data import small_samples, write_one_tar
from parsers.parser import Parser, Prepared, contents, in_place

_TOML = b"""# of the whole project
data = "imagefolder:~/images"
batch-size = 64
registry = "s3://bucket/team"
verbose = true

[build]
teacher = "resnet34"
views = 8
policy = "crop,flip,color(0.4,0.4,0.4,0.1)"
temperatures = [1, 4.0]

[train]
loss = ["nkd:gamma=1.5", "ce"]
seed = [0, 1, 2]
lr = 1e-3
epochs = 30
amp = "bf16"

[ls]
json = true
"""


def _settings(top: Path) -> Prepared:
    """kdcache.toml, up to the values of each command's options."""
    known = known_options(main.commands)
    files = {"kdcache.toml": top / "kdcache.toml"}
    files["kdcache.toml"].write_bytes(_sound(known, top))

    def read() -> Any:
        found = load_settings(known, {}, top / "kdcache.toml")
        return _values(found)

    return Prepared(contents(files), in_place(files, read), TOML)


def _sound(known: Any, top: Path) -> bytes:
    """The settings of _TOML that this version has."""
    kept: list[bytes] = []
    for line in _TOML.splitlines(keepends=True):
        (top / "kdcache.toml").write_bytes(b"".join([*kept, line]))
        try:
            _values(load_settings(known, {}, top / "kdcache.toml"))
        except Exception:
            continue
        kept.append(line)
    return b"".join(kept)


def _values(found: Any) -> Any:
    values = {}
    for name, command in main.commands.items():
        context = click.Context(command, info_name=name)
        for option in options_of(command):
            if setting := found[name].get(flag_of(option)):
                given = [setting.value] if option.multiple else setting.value
                values[name, option.name] = str(option.process_value(context, given))
    return values


def _environment(top: Path) -> Prepared:
    known = known_options(main.commands)
    seeds = dict.fromkeys(("KDCACHE_BATCH_SIZE", "KDCACHE_TRAIN_LR", "KDCACHE_VIEWS"), b"64")
    seeds |= {"KDCACHE_LOSS": b"nkd:gamma=1.5,ce", "KDCACHE_DATA": b"digits", "KDCACHE_REGISTRY": b"s3://bucket/team"}

    def read(name: str, content: bytes) -> Any:
        return _values(load_settings(known, {name: os.fsdecode(content)}, top / "none.toml"))

    return Prepared(seeds, read, WORDS)


def _text(content: bytes) -> str:
    """What a text with lone surrogates, as JSON may hold it, was before it was encoded."""
    try:
        return content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return content.decode("utf-8", "surrogateescape")


def _policies(top: Path) -> Prepared:
    texts = ("crop,flip", "rrc(0.08,1,0.75,1.333),flip", "crop(0.5),trivial", "rrc,flip,randaugment(2,9),erase(0.25)",
             "crop,flip,mixup(0.2),cutmix(1)", "flip,three,color(0.3,0.3,0.3,0)", *NAMED)  # fmt: skip
    sound = []
    for text in texts:
        try:
            check_policy(text)
            sound.append(text)
        except Exception:
            continue
    return Prepared({text: text.encode() for text in sound}, lambda name, content: check_policy(_text(content)), WORDS)


def _losses(top: Path) -> Prepared:
    seeds = {spec: spec.encode() for spec in (spec_of(make_loss(name, 10)) for name in LOSSES)}

    def read(name: str, content: bytes) -> Any:
        spec = _text(content)
        return [(spec_of(make_loss(spec, n)), described(spec, n)) for n in (10, 100)]

    return Prepared(seeds, read, WORDS)


def _networks(top: Path) -> Prepared:
    texts = (
        "resnet8", "resnet20_a", "torchvision/resnet18", "timm/vit_tiny_patch16_224:img_size=96,drop_rate=0.1",
        "timm/resnet18.a1_in1k", "no_such_module_here:make", "timm/resnet10t:act_layer=relu",
    )  # fmt: skip

    def read(name: str, content: bytes) -> Any:
        text = _text(content)
        if not names_code(name):
            stored_network(text, "here", "--teacher")
        found = canonical_name(text), built_for(text), names_code(text)
        if text == name or names_code(text) or "/" in text:  # building timm's takes seconds
            return found
        return *found, sum(p.numel() for p in outline(text, 3, 16).parameters())

    return Prepared({text: text.encode() for text in texts}, read, WORDS)


def _datasets(top: Path) -> Prepared:
    """Specs of datasets that lie in the working directory."""
    os.chdir(top)
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    write_folder(Path("images"), small_samples())
    write_csv(Path.cwd(), small_samples())
    write_one_tar(Path("a00.tar"), small_samples(), text=True)
    texts = (
        "imagefolder:images",
        "imagefolder:images?train=train&eval=val",
        "files:table.csv",
        "wds:a{00..00}.tar",
        "digits",
    )

    def read(name: str, content: bytes) -> Any:
        text = _text(content)
        stored_data(text, "here")
        data = open_data(text, "train", home=top / "home")
        return placed(text), len(data), data.class_names

    return Prepared({text: text.encode() for text in texts}, read, WORDS)


def _places(top: Path) -> Prepared:
    """Names, keys and addresses of caches, of weights and of places in them."""
    os.chdir(top)
    os.environ["KDCACHE_HOME"] = str(top / "home")
    cache = copied_cache(top / "home" / "caches" / "c")
    cache.path.rename(top / "home" / "caches" / cache.key)
    texts = (cache.key, cache.key[:8], f"https://host.invalid/team/caches/{cache.key}", "s3://bucket/names/best")

    def read(name: str, content: bytes) -> Any:
        text = _text(content)
        found = split_url(text), split_place(text), place_of(text)
        if "://" in text:  # nothing is fetched here
            return found
        return *map(str, found), open_store(text).key, open_cache(text).key

    return Prepared({text: text.encode() for text in texts}, read, WORDS)


PARSERS = (
    Parser("kdcache.toml", 60, _settings),
    Parser("environment", 15, _environment),
    Parser("view policies", 60, _policies),
    Parser("losses", 30, _losses),
    Parser("networks' names", 20, _networks),
    Parser("datasets' specs", 10, _datasets, slow=True),
    Parser("caches' names", 15, _places),
)

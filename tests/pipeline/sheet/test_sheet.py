"""The contact sheet holds the very pixels and parameters of a build, and what is wrong is one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from kdcache.cli import main
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.sheet.config import ViewsConfig
from kdcache.pipeline.sheet.picture import Layout
from kdcache.pipeline.sheet.sheet import draw_sheet
from kdcache.pipeline.views.operations.kinds.mix import label_weights
from kdcache.pipeline.views.operations.operation import of_rows
from kdcache.pipeline.views.parameters import ViewParameters, draw, evaluation_view
from kdcache.pipeline.views.render import Renderer
from kdcache.tests.helpers import images

pytestmark = pytest.mark.usefixtures("own_home", "one_thread")

STRONG = "rrc(0.3,1),flip,trivial,erase(0.6)"


@pytest.fixture
def folder(tmp_path):
    """Files of many sizes in two classes, eleven to learn from."""
    for i in range(13):
        images.draw(tmp_path / "pics" / ("train" if i < 11 else "val") / f"c{i % 2}" / f"{i:02d}.png", 70 + i, 90 - i)
    return f"imagefolder:{tmp_path / 'pics'}"


def quiet(_):
    pass


def shown(path, layout):
    """The pixels of the sheet's images, uint8 [rows, columns, H, W, 3]: each is enlarged by whole pixels."""
    sheet, scale = np.array(Image.open(path)), layout.scale
    found = np.empty((layout.rows, layout.columns, layout.height, layout.width, 3), np.uint8)
    assert sheet.shape == (*layout.size[::-1], 3)
    for row, column in np.ndindex(layout.rows, layout.columns):
        x, y = layout.corner(row, column)
        cell = sheet[y : y + scale * layout.height, x : x + scale * layout.width]
        found[row, column] = cell[::scale, ::scale]
        assert np.array_equal(found[row, column].repeat(scale, 0).repeat(scale, 1), cell)
    return found


def rendered(config, samples):
    """What a build renders, from parameters of all samples of a view at once."""
    data = open_data(config.data, "train")
    side = config.size or data.image_size or 224
    renderer = Renderer(data, side, torch.device("cpu"), config.policy, 0, config.interpolation)
    everyone = range(len(data))
    drawn = [
        draw(config.policy, config.seed, view, everyone, data.sizes, sequence=config.sequence)
        for view in range(config.views)
    ]
    columns = [evaluation_view(data.sizes, data.in_memory), *drawn]
    pixels = [next(renderer.batches(of, [np.array(samples)])) for of in columns]
    return torch.stack(pixels, 1).permute(0, 1, 3, 4, 2).numpy(), drawn, renderer.size


CONFIGS = {
    "plain": ViewsConfig("crop"),
    "resized": ViewsConfig("crop,flip", size=20, samples=3, views=2, interpolation="bicubic"),
    "spread": ViewsConfig(STRONG, sequence="spread", seed=5, samples=3, views=6),
    "mixed": ViewsConfig(f"{STRONG},mixup(0.8)", seed=1, samples=4, views=6),
    "mixed and spread": ViewsConfig("flip,mixup(0.2),cutmix(1)", sequence="spread", samples=4, views=9),
}


@pytest.mark.parametrize("which", CONFIGS)
@pytest.mark.parametrize("kind", ["digits", "files"])
def test_pixels_and_parameters_are_those_of_a_build(which, kind, folder):
    config = CONFIGS[which]
    if kind == "files":
        config = ViewsConfig(**{**vars(config), "data": folder, "size": config.size or 48})
    sheet = draw_sheet(config, quiet)
    assert sheet.path == Path("views.png") and sheet.facts["policy"] == config.policy
    samples = [of["sample"] for of in sheet.facts["samples"]]
    assert len(set(samples)) == len(samples) == config.samples
    expected, drawn, size = rendered(config, samples)
    title = f"{config.policy}\n{config.data.partition(':')[0]}, {size[0]} pixels, seed {config.seed}"
    title += ", spread views" * (config.sequence == "spread")
    layout = Layout(config.samples, 1 + config.views, *size, title)
    assert np.array_equal(shown(sheet.path, layout), expected)
    for of in sheet.facts["samples"]:
        for view, found in zip(drawn, of["views"], strict=True):
            assert found == parameters(view, of["sample"], size)


def parameters(view, sample, size):
    """What the sheet should tell of a sample, from the parameters of all samples."""
    found = {"box": view.boxes[sample].tolist(), "flip": bool(view.flips[sample])}
    found["drawn"] = {op: {name: rows[sample].tolist() for name, rows in of.items()} for op, of in view.drawn.items()}
    if view.mixing is None:
        return found
    partner, drawn = int(view.mixing.partners[sample]), of_rows(view.mixing.drawn, slice(sample, sample + 1))
    theirs = parameters(ViewParameters(view.boxes, view.flips, view.drawn), partner, size)
    mixing = {"partner": partner, **{name: rows[0].tolist() for name, rows in drawn.items()}}
    return {**found, "mixing": {**mixing, "shares": label_weights(drawn, *size)[0].tolist(), "theirs": theirs}}


def kdcache(line):
    return CliRunner().invoke(main, line.split(), catch_exceptions=False)


def test_the_policy_is_spelled_out_and_the_short_form_shows_digits():
    told = kdcache("views --samples 2 --views 1")
    assert told.exit_code == 0
    assert told.stdout == (
        "policy crop (the default for digits)\nviews.png: 2 samples of digits in 1 view, 8 pixels, enlarged 14 times\n"
    )
    told = kdcache("views three-augment --samples 2 --views 1 --out three.png").stdout
    assert told.startswith("policy rrc,flip,three,color(0.3,0.3,0.3,0) (given as three-augment)\nthree.png: ")
    found = json.loads(kdcache("views --augment mixup --samples 1 --views 2 --json").stdout)
    assert found["policy"] == "mixup(0.8)" and len(found["samples"][0]["views"]) == 2


def test_a_setting_is_taken_unless_a_policy_is_typed(monkeypatch):
    monkeypatch.setenv("KDCACHE_AUGMENT", "flip")
    for line, policy in (("views", "flip"), ("views gray", "gray(0.2)"), ("views --augment rrc", "rrc")):
        assert json.loads(kdcache(f"{line} --samples 1 --views 1 --json").stdout)["policy"] == policy


def test_more_samples_than_there_are_and_a_single_one(tmp_path):
    for i in range(3):
        images.draw(tmp_path / "pics" / ("train" if i < 1 else "val") / f"c{i // 2}" / f"{i}.png", 70, 90)
    found = json.loads(kdcache(f"views mixup --data imagefolder:{tmp_path}/pics --unlabelled --size 32 --json").stdout)
    (only,) = found["samples"]
    assert only["sample"] == 0 and all(view["mixing"]["partner"] == 0 for view in only["views"])


MISTAKES = {
    "views crpo": ("unknown operation 'crpo'", "did you mean crop?"),
    "views color(9,9)x": ("cannot be read from",),
    "views crop --augment flip": ("Give POLICY or --augment, not both.",),
    "views crop flip": ("unexpected extra argument (flip)",),
    "views --views 0": ("--views",),
    "views --samples none": ("--samples",),
    "views --data nowhere": ("unknown dataset 'nowhere'",),
    "views --out .": ("--out . is a folder, not a file",),
    "views --out sheet.jpg": ("--out sheet.jpg", "ends in .png"),
    "views --out no/where.png": ("there is no folder no",),
    "views --out text.png": ("text.png is there already and is no PNG",),
    "views --views 1000 --samples 1000": ("million pixels", "fewer --samples or --views, or a smaller --size"),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(line):
    Path("text.png").write_text("mine")
    result = kdcache(line)
    assert result.exit_code == 2 and not result.stdout
    assert all(part in result.stderr.splitlines()[-1] for part in MISTAKES[line]), result.stderr
    assert Path("text.png").read_text() == "mine" and not Path("views.png").exists()


def test_names_that_the_font_lacks_and_long_ones_are_written_as_far_as_they_go(tmp_path):
    for i in range(4):
        name = "鳥" if i % 2 else "a name that is far too long for what is below an image"
        images.draw(tmp_path / "pics" / ("train" if i < 2 else "val") / name / f"{i}.png", 70, 90)
    config = ViewsConfig("mixup(0.8)", data=f"imagefolder:{tmp_path}/pics", size=40, views=1)
    assert draw_sheet(config, quiet).path.exists()

"""Draws the pictures of docs/views.md: strips of views of two photographs that scikit-learn brings.

python bench/views_pictures.py [--out docs/views]
"""

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

from kdcache.pipeline.data.kinds.arrays import ArrayDataset
from kdcache.pipeline.sheet.config import ViewsConfig
from kdcache.pipeline.sheet.picture import Layout, sheet_png
from kdcache.pipeline.sheet.sheet import draw_sheet
from kdcache.pipeline.views.operations.kinds.auto import LEVELS, MEMBERS, POSTERIZE, SOLARIZE, WIDE, changed
from kdcache.pipeline.views.operations.kinds.colour import ONE, Color
from kdcache.pipeline.views.parameters import draw, evaluation_view
from kdcache.pipeline.views.render import Renderer
from kdcache.tests.helpers.places import ROOT

SIDE, VIEWS, GAP, COLOURS = 112, 8, 4, 256
CPU = torch.device("cpu")
# What is shown of each operation: probabilities are higher than usual, so that a few views show what it does.
STRIPS = {
    "crop": "crop",
    "rrc": "rrc(0.08,1)",
    "flip": "flip(0.5)",
    "three": "three",
    "trivial": "trivial",
    "randaugment": "randaugment(2,9)",
    "color": "color(0.4,0.4,0.4,0.1)",
    "gray": "gray(0.5)",
    "blur": "blur(1)",
    "solarize": "solarize(0.5)",
    "erase": "erase(0.75)",
    "mixup": "mixup(0.8)",
    "cutmix": "cutmix(1)",
    "three-augment": "three-augment",
    "ml-dr": "ml-dr",
}
BOTH = {"rrc", "trivial", "randaugment", "mixup", "cutmix", "three-augment", "ml-dr"}  # of both photographs
WHOLE = {"blur": 224}  # pixels of the image of which the middle is shown, where one would see nothing in a small one


def photographs() -> ArrayDataset:
    """Squares of 427 pixels of the two photographs."""
    lefts = 15, 106
    pixels = np.stack([image[:, x : x + 427] for image, x in zip(load_sample_images().images, lefts, strict=True)])
    return ArrayDataset(
        name="photographs",
        split="train",
        labels=np.arange(2).reshape(2, 1),
        class_names=("china", "flower"),
        sizes=np.array([pixels.shape[1:3]] * 2, np.int32),
        mean=(0.5,) * 3,
        std=(0.3,) * 3,
        pixels=torch.from_numpy(pixels),
    )


def strip(data: ArrayDataset, policy: str, side: int, both: bool) -> np.ndarray:
    """The photographs and views of them, uint8 [rows, 1 + VIEWS, SIDE, SIDE, 3]."""
    renderer, everyone = Renderer(data, side, CPU, policy, 0), np.arange(2)
    columns = [evaluation_view(data.sizes, True), *(draw(policy, 0, v, range(2), data.sizes) for v in range(VIEWS))]
    images = torch.stack([next(renderer.batches(of, [everyone])) for of in columns], 1)
    edge = (side - SIDE) // 2
    middle = images[:, :, :, edge : edge + SIDE, edge : edge + SIDE].permute(0, 1, 3, 4, 2)
    return middle.numpy() if both else middle[:1].numpy()


def side_by_side(cells: np.ndarray) -> Image.Image:
    rows, columns = cells.shape[:2]
    paper = np.full((rows * (SIDE + GAP) - GAP, columns * (SIDE + GAP) - GAP, 3), 255, np.uint8)
    for row, column in np.ndindex(rows, columns):
        top, left = row * (SIDE + GAP), column * (SIDE + GAP)
        paper[top : top + SIDE, left : left + SIDE] = cells[row, column]
    return Image.fromarray(paper)


def members(data: ArrayDataset) -> Image.Image:
    """Each member of TrivialAugment at two thirds of its strength, with its number and name."""
    whole = next(Renderer(data, SIDE, CPU, "none", 0).batches(evaluation_view(data.sizes, True), [np.array([0])]))
    count = len(MEMBERS)
    member, level = np.arange(count, dtype=np.int8), np.full(count, 2 * LEVELS // 3, np.int8)
    level[[POSTERIZE, SOLARIZE]] = LEVELS - 6, LEVELS // 2
    images = changed(whole.repeat(count, 1, 1, 1), member[:, None], level[:, None], WIDE).permute(0, 2, 3, 1).numpy()
    layout = Layout(2, count // 2, SIDE, SIDE, "")
    captions = [[[f"{number} {MEMBERS[number]}"] for number in range(row, row + 7)] for row in (0, 7)]
    return Image.open(io.BytesIO(sheet_png(layout, images.reshape(2, 7, *images.shape[1:]), [""] * 7, captions)))


def spread() -> Image.Image:
    """Brightness and contrast of one sample's first 64 views, in both sequences."""
    side, dot, sizes = 230, 3, np.full((1, 2), 8, np.int32)
    panels = []
    for sequence in ("random", "spread"):
        panel = Image.new("RGB", (side + 2, side + 2), (255, 255, 255))
        pen = ImageDraw.Draw(panel)
        pen.rectangle((0, 0, side + 1, side + 1), outline=(120, 120, 120))
        for view in range(64):
            drawn = draw(str_of(Color(0.8, 0.8, 0, 0)), 0, view, range(1), sizes, sequence=sequence).drawn["color"]
            x, y = ((int(drawn[name][0]) / ONE - 0.2) / 1.6 * side for name in ("brightness", "contrast"))
            pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=(30, 90, 160))
        panels.append(np.array(panel))
    layout = Layout(1, 2, side + 2, side + 2, "")
    heads = ["--sequence random", "--sequence spread"]
    return Image.open(io.BytesIO(sheet_png(layout, np.array([panels]), heads, [[[], []]])))


def str_of(color: Color) -> str:
    return f"color({color.brightness},{color.contrast},{color.saturation},{color.hue})"


def sheet(data: ArrayDataset) -> Image.Image:
    """What `kdcache views` writes for a folder with the two photographs."""
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            for name, pixels in zip(data.class_names, data.pixels.numpy(), strict=True):
                path = Path(folder) / split / name / "0.png"
                path.parent.mkdir(parents=True)
                Image.fromarray(pixels).save(path)
        out = Path(folder) / "views.png"
        config = ViewsConfig(
            "rrc,flip,randaugment(2,9),mixup(0.8),cutmix(1)", data=f"imagefolder:{folder}", views=5, size=160,
            out=str(out),
        )  # fmt: skip
        draw_sheet(config, print)
        with Image.open(out) as picture:
            return picture.convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "views")
    out = parser.parse_args().out
    data = photographs()
    pictures = {
        name: side_by_side(strip(data, policy, WHOLE.get(name, SIDE), name in BOTH)) for name, policy in STRIPS.items()
    }
    pictures |= {"members": members(data), "spread": spread(), "sheet": sheet(data)}
    out.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        few = picture.convert("RGB").quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(out / f"{name}.png", optimize=True)
    print(f"{sum(path.stat().st_size for path in out.glob('*.png')):,} bytes in {len(pictures)} pictures in {out}")


if __name__ == "__main__":
    main()

"""Caches and run folders to report on, whose names try to be obeyed; and what a browser would obey on a page."""

import json
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from kdcache.pipeline.data.dataset import open_data
from kdcache.tests.helpers.ffcv import Drawn

# Names of classes, as folders; none of them may ever do what it says.
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    '"><script>alert(2)<',
    "javascript:alert(3)",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}$ &amp; <b>bold<",
    "evil\u202egnp.exe\u0007",
    "x" * 200,
)


def hostile_cache(place, classes=HOSTILE, each=6, views=3, side=24, **record):
    """A cache of random answers to image files in class folders of these names, and the name of the data."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            folder = place / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"{i}.png")
    spec = f"imagefolder:{place / 'images'}"
    data = open_data(spec, "train", home=place)
    record = {"classes": len(classes), "k": None, **record}
    return Drawn(place / "cache", data, "crop,flip", views, part=32, **record).cache, spec


def write_run(folder, loss="nkd", seed=0, epochs=3, top1=0.5, done=None, summary=True, **settings):
    """A run's folder without weights. done: how many epochs it has come to; None for all."""
    folder.mkdir(parents=True)
    config = {
        "loss": loss, "loss_options": {"gamma": 1.5}, "seed": seed, "epochs": epochs, "lr": 0.05, "batch_size": 8,
        "accumulate": 1, "student": "resnet8", "cache": "c" * 64, "cache_path": "/nowhere", "data": "digits",
        **settings,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {
            "epoch": e, "loss": 2.0 / e, "loss_ce": 1.5 / e, "loss_kd": 0.5 / e, "seconds": 1.0 + e / 10,
            "top1": top1 * e / epochs, "nll": 1.0 / e, "ece": 0.1, "agreement": top1, "kl": 0.3,
        }
        for e in range(1, (epochs if done is None else done) + 1)
    ]  # fmt: skip
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary and done is None:
        (folder / "summary.json").write_text(json.dumps({"epochs": epochs, "top1": top1}))
    return folder


VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
ACTIVE = {"script", "iframe", "object", "embed", "form", "input", "button", "base", "video", "audio", "foreignobject"}


class Markup(HTMLParser):
    """What a page is made of. faults: tags that are not closed, ids that stand twice, and whatever runs or loads."""

    def __init__(self, text):
        super().__init__()
        self.faults, self.tags, self.texts, self._open, self._ids = [], [], [], [], set()
        self.feed(text)
        self.close()
        self.faults += [f"{tag} is not closed" for tag in self._open]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag in ACTIVE:
            self.faults.append(f"<{tag}> is active")
        for name, value in attributes:
            value = value or ""
            if name == "id":
                if value in self._ids:
                    self.faults.append(f"id {value} stands twice")
                self._ids.add(value)
            if name.startswith("on"):
                self.faults.append(f"{tag} has {name}")
            if name in ("src", "href", "xlink:href", "action", "srcset") and not value.startswith(("data:", "#")):
                self.faults.append(f"{tag} loads {value}")
        if tag == "img" and "alt" not in dict(attributes):
            self.faults.append("an image has no alternative text")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        if not self._open or self._open[-1] != tag:
            self.faults.append(f"</{tag}> closes {self._open[-1:]}")
        else:
            self._open.pop()

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())

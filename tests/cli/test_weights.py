"""Weights that are damaged, foreign or do not fit are refused, and no code in them is run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcache.tests.helpers.commands import Place, paint, works


class _Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, (str(self.proof),)


def test_code_in_weights_is_not_run(place: Place, data: str, refused: Callable[..., str]) -> None:
    proof, file = place.work / "proof", place.work / "evil.pt"
    for content in ({"state_dict": load_file(place.weights), "more": _Evil(proof)}, _Evil(proof)):
        torch.save(content, file)
        refused(f"build --teacher resnet8 {data} --weights {file}", str(file), "posix.mkdir", "nothing of it was run")
        refused(f"eval {file}", str(file))
    assert not proof.exists()


@pytest.mark.parametrize(
    "content", ["cut.safetensors", "cut.pt", "empty.safetensors", "empty.pt", "text.pt", "image.pt", "list.pt"]
)
def test_damaged_weights(content: str, place: Place, data: str, refused: Callable[..., str]) -> None:
    whole, file = place.weights.read_bytes(), place.work / content
    torch.save([1, 2] if content == "list.pt" else load_file(place.weights), file)
    match content:
        case "cut.safetensors":
            file.write_bytes(whole[: len(whole) // 2])
        case "cut.pt":
            file.write_bytes(file.read_bytes()[:3000])
        case "empty.safetensors" | "empty.pt":
            file.write_bytes(b"")
        case "text.pt":
            file.write_text("hello world, this is text\n" * 9)
        case "image.pt":
            file.write_bytes((place.pics / "val/c0/00.png").read_bytes())
    refused(f"build --teacher resnet8 {data} --weights {file}", str(file))
    refused(f"eval {file}", str(file))


def test_layers_that_do_not_fit_are_named(place: Place, data: str, refused: Callable[..., str]) -> None:
    state = load_file(place.weights)
    state["fc.weight"] = torch.zeros(4, 32)
    state["extra"] = state.pop("fc.bias")
    torch.save(state, "odd.pt")
    wrong = ("fc.weight is (4, 32), the network has (4, 64)", "1 missing (fc.bias)", "1 not in the network (extra)")
    refused(f"build --teacher resnet8 {data} --weights odd.pt", *wrong)


@pytest.mark.parametrize("notes", ["no json", "[1]", '{"student": 1}', '{"input_size": "x"}'])
def test_notes_of_others_in_safetensors(notes: str, place: Place, data: str, refused: Callable[..., str]) -> None:
    save_file(load_file(place.weights), "foreign.safetensors", {"kdcache": notes})
    refused(f"build --teacher resnet8 {data} --weights foreign.safetensors", "foreign.safetensors")
    refused("eval foreign.safetensors", "foreign.safetensors")
    save_file(load_file(place.weights), "foreign.safetensors", {"format": "pt"})
    refused("eval foreign.safetensors", "was not written by kdcache")


def test_a_teacher_near_chance(place: Place, data: str, refused: Callable[..., str]) -> None:
    """Classes in another order; with --allow-low-accuracy the same builds."""
    state = load_file(place.weights)
    for name in ("fc.weight", "fc.bias"):
        state[name] = state[name].roll(1, 0)
    torch.save(state, "rolled.pt")
    line = f"build --teacher resnet8 {data} --weights rolled.pt --views 1 --out {place.work}/low"
    refused(line, "images of c0 are answered as c1", "--class-map", "--allow-low-accuracy")
    assert json.loads(works(f"{line} --allow-low-accuracy --json").stdout)["teacher_top1"] < 0.1


def test_classes_that_do_not_fit(place: Place, refused: Callable[..., str]) -> None:
    three, one = (paint(place.work / str(n), classes=n, each=10) for n in (3, 1))
    line = f"build --teacher resnet8 --weights {place.weights} --data imagefolder:{three}"
    refused(line, "the teacher has 4 classes, but imagefolder has 3", "--class-map")
    works(f"{line} --views 1 --out {place.work}/mapped --class-map auto")
    (place.work / "map.csv").write_text("c0,0\nc1,7\nc2,2\n")
    refused(f"{line} --class-map map.csv", "7", "0 to 3")
    refused(f"teach --teacher resnet8 --data imagefolder:{one}", "1 class")

"""How many images a teacher answers a second on a CPU, by batch size: the table in data/defaults.py is made of it.

    python bench/batches.py --out bench/results/batches.json

One thread, and its own time, because the machine may have other work; the fastest of the rounds counts.
`same` is the share of images whose logits are bit-equal to those of the largest batch.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torchvision

from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.train.bench.bench import machine

IMAGES = 128
BATCHES = 8, 32, 128
NETWORKS = {
    "efficientnet_b0": 224, "mobilenet_v3_large": 224, "resnet34": 224, "resnet18": 64, "resnet56": 32, "wrn_40_2": 32,
    "resnet8": 8,
}  # fmt: skip


def measure(name: str, size: int, rounds: int) -> dict[str, object]:
    """Images/s by batch size, and how many images are answered alike."""
    model = Classifier(build_network(name, 1000, size), (0.5,) * 3, (0.25,) * 3).eval()
    model.to(memory_format=torch.channels_last)
    noise = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (IMAGES, 3, size, size), dtype=torch.uint8, generator=noise)
    images = images.contiguous(memory_format=torch.channels_last)
    seconds = dict.fromkeys(BATCHES, float("inf"))
    logits = {}
    with torch.inference_mode():
        model(images[:8])
        for _ in range(rounds):
            for batch in BATCHES:
                start = time.process_time()
                logits[batch] = torch.cat([model(part) for part in images.split(batch)])
                seconds[batch] = min(seconds[batch], time.process_time() - start)
    whole = logits[BATCHES[-1]]
    return {
        "size": size,
        "images_per_second": {batch: round(IMAGES / seconds[batch], 2) for batch in BATCHES},
        "same": {batch: round(float((logits[batch] == whole).all(1).float().mean()), 3) for batch in BATCHES},
        "largest_difference": {batch: float((logits[batch] - whole).abs().max()) for batch in BATCHES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        **machine(), "torchvision": torchvision.__version__, "threads": torch.get_num_threads(),
        "rounds": args.rounds, "images": IMAGES, "networks": {},
    }  # fmt: skip
    for name in args.networks:
        found["networks"][name] = measure(name, NETWORKS[name], args.rounds)
        print(name, json.dumps(found["networks"][name]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A student from a cache with accelerate.

python examples/with_accelerate.py CACHE
accelerate launch --num_processes 2 examples/with_accelerate.py CACHE
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from kdcache.cache import open_cache
from kdcache.train import CachedDataset, build_network, make_loss


def main(name: str, data: str = "digits", loss: str = "kd", epochs: int = 20, seed: int = 0) -> dict[str, float]:
    accelerator = Accelerator()
    set_seed(seed)
    cache = open_cache(name)
    classes = cache.identity.record.classes
    train, held_out = CachedDataset(cache, data), CachedDataset(cache, data, split="eval")
    size = 64 // accelerator.num_processes
    student = build_network("resnet8", classes, train[0][0].shape[-1])
    optimiser = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    student, optimiser, loader, evaluation = accelerator.prepare(
        student,
        optimiser,
        DataLoader(train, size, shuffle=True, drop_last=True, collate_fn=train.collate),
        DataLoader(held_out, 500, collate_fn=held_out.collate),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser.optimizer, 0.05, epochs * len(loader), pct_start=0.05)
    criterion = make_loss(loss, classes)
    for epoch in range(epochs):
        loader.set_epoch(epoch)  # the order; accelerate counts epochs of its own, which this sets too
        train.set_epoch(epoch)  # the view, which accelerate sets for one process and leaves alone for several
        for images, labels, records in loader:
            optimiser.zero_grad()
            accelerator.backward(criterion(student(images), labels, records))
            optimiser.step()
            schedule.step()
    student.eval()
    right = []
    with torch.no_grad():
        for images, labels, _ in evaluation:
            right.append(accelerator.gather_for_metrics(student(images).argmax(1) == labels))
    return {"top1": float(torch.cat(right).float().mean())}


if __name__ == "__main__":
    print(main(sys.argv[1], epochs=int((sys.argv[2:] or ["20"])[0])))

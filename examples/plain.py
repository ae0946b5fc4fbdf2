"""A student from a cache, in a loop of plain PyTorch.

python examples/plain.py CACHE
torchrun --nproc-per-node 2 examples/plain.py CACHE
"""

import os
import sys

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler

from kdcache.cache import open_cache
from kdcache.train import CachedDataset, build_network, make_loss, metrics


def main(name: str, data: str = "digits", loss: str = "kd", epochs: int = 20, seed: int = 0) -> dict[str, float]:
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    if ranks > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(seed)
    cache = open_cache(name)
    classes = cache.identity.record.classes
    train, held_out = CachedDataset(cache, data), CachedDataset(cache, data, split="eval")
    sampler = DistributedSampler(train, ranks, rank, seed=seed, drop_last=True)
    shared = {"num_workers": 0, "collate_fn": train.collate, "pin_memory": device.type == "cuda"}
    loader = DataLoader(train, 64 // ranks, sampler=sampler, drop_last=True, **shared)
    student = build_network("resnet8", classes, train[0][0].shape[-1]).to(device)
    model = nn.parallel.DistributedDataParallel(student) if ranks > 1 else student
    criterion = make_loss(loss, classes)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.05, epochs * len(loader), pct_start=0.05)
    for epoch in range(epochs):
        train.set_epoch(epoch)  # the view
        sampler.set_epoch(epoch)  # the order
        for images, labels, records in loader:
            logits = model(images.to(device, non_blocking=True))
            optimiser.zero_grad()
            criterion(logits, labels.to(device, non_blocking=True), records.to(device)).backward()
            optimiser.step()
            schedule.step()
    student.eval()
    with torch.no_grad():
        logits = [student(images.to(device)).cpu() for images, *_ in DataLoader(held_out, 500, **shared)]
    if ranks > 1:
        distributed.destroy_process_group()
    return metrics(torch.cat(logits), torch.from_numpy(held_out.data.labels[:, 0]), cache.read_evaluation())


if __name__ == "__main__":
    found = main(sys.argv[1], epochs=int((sys.argv[2:] or ["20"])[0]))
    if os.environ.get("RANK", "0") == "0":
        print(found)

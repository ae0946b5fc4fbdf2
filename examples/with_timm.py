"""A student from a cache as timm's train.py trains: its optimisers, schedules and averaged weights (needs timm).

python examples/with_timm.py CACHE
"""

import sys

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, ModelEmaV3, accuracy, random_seed

from kdcache.cache import open_cache
from kdcache.train import CachedDataset, CachedLoader, build_network, make_loss


def train_one_epoch(epoch, model, loader, criterion, optimiser, schedule, average) -> None:
    model.train()
    for step, (images, labels, records) in enumerate(loader, epoch * len(loader)):
        loss = criterion(model(images), labels, records)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        average.update(model, step)
        schedule.step_update(step + 1)


@torch.no_grad()
def validate(model, evaluation: CachedDataset) -> float:
    top1 = AverageMeter()
    for images, labels, _ in torch.utils.data.DataLoader(evaluation, 500, collate_fn=evaluation.collate):
        top1.update(accuracy(model(images), labels)[0].item() / 100, len(images))
    return top1.avg


def main(name: str, data: str = "digits", loss: str = "kd", epochs: int = 20, seed: int = 0) -> dict[str, float]:
    random_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = open_cache(name)
    loader = CachedLoader(cache, data, 64, seed=seed, device=device)
    evaluation = CachedDataset(cache, data, split="eval")
    classes = cache.identity.record.classes
    model = build_network("resnet8", classes, evaluation[0][0].shape[-1]).to(device)
    criterion = make_loss(loss, classes)
    optimiser = create_optimizer_v2(model, "sgd", lr=0.05, weight_decay=5e-4)  # with Nesterov's momentum
    updates = epochs * len(loader)
    schedule = CosineLRScheduler(optimiser, updates, warmup_t=len(loader), warmup_lr_init=1e-3, t_in_epochs=False)
    average = ModelEmaV3(model, decay=0.99, use_warmup=True)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        train_one_epoch(epoch, model, loader, criterion, optimiser, schedule, average)
    return {"top1": validate(average.module.to("cpu").eval(), evaluation)}


if __name__ == "__main__":
    print(main(sys.argv[1], epochs=int((sys.argv[2:] or ["20"])[0])))

"""A student from a cache with Lightning: python examples/lightning_module.py CACHE."""

import sys

import torch
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from kdcache.cache import open_cache
from kdcache.train import CachedDataset, build_network, make_loss


class Cached(LightningDataModule):
    def __init__(self, name: str, data: str) -> None:
        super().__init__()
        self.cache = open_cache(name)
        self.train, self.held_out = (CachedDataset(self.cache, data, split=split) for split in ("train", "eval"))

    def train_dataloader(self) -> DataLoader:
        self.train.set_epoch(self.trainer.current_epoch)  # where a run goes on, the hook below comes too late
        return DataLoader(self.train, 64, shuffle=True, drop_last=True, collate_fn=self.train.collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, 500, collate_fn=self.train.collate)


class Student(LightningModule):
    def __init__(self, classes: int, size: int, loss: str) -> None:
        super().__init__()
        self.network, self.criterion = build_network("resnet8", classes, size), make_loss(loss, classes)

    def on_train_epoch_start(self) -> None:
        self.trainer.datamodule.train.set_epoch(self.current_epoch)

    def training_step(self, batch, number):
        return self.criterion(self.network(batch[0]), *batch[1:])

    def validation_step(self, batch, number):
        right = (self.network(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("top1", right, batch_size=len(batch[1]), sync_dist=True)

    def configure_optimizers(self):
        optimiser = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.05, steps, pct_start=0.05)
        return [optimiser], [{"scheduler": schedule, "interval": "step"}]


def main(name: str, data: str = "digits", loss: str = "kd", epochs: int = 20, seed: int = 0) -> dict[str, float]:
    seed_everything(seed, verbose=False)
    cached = Cached(name, data)
    off = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = Trainer(max_epochs=epochs, num_sanity_val_steps=0, check_val_every_n_epoch=epochs, **off)
    trainer.fit(Student(cached.cache.identity.record.classes, cached.train[0][0].shape[-1], loss), cached)
    return {"top1": float(trainer.callback_metrics["top1"])}


if __name__ == "__main__":
    print(main(sys.argv[1], epochs=int((sys.argv[2:] or ["20"])[0])))

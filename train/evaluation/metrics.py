"""How good a student is on the evaluation split, and how close to its teacher there."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.records.records import Records
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.views.parameters import Parameters, evaluation_view
from kdcache.pipeline.views.render import Renderer
from kdcache.train import group

_BATCH = 500
_ECE_BINS = 15


@torch.no_grad()
def predict(
    model: Classifier,
    data: Dataset,
    renderer: Renderer,
    dtype: torch.dtype | None = None,
    view: Parameters | None = None,
    samples: NDArray[np.int64] | None = None,
) -> Tensor:
    """float32 logits [N, C] on the CPU for the unaugmented images, autocast to dtype; leaves the model in eval().

    view: show the images in this view of all of them instead. samples: answer these alone, int64 [N]. Ranks share the
    images: all of them have to call this, and the first one gets all logits, the others their own.
    """
    model.eval()
    samples = np.arange(len(data)) if samples is None else samples
    batches = np.split(samples, range(_BATCH, len(samples), _BATCH))
    parameters = evaluation_view(data.sizes, whole=data.in_memory) if view is None else view
    shares = [[batches[i] for i in share] for share in np.array_split(np.arange(len(batches)), group.world())]
    out = []
    for images in renderer.batches(parameters, shares[group.rank()]):
        with torch.autocast(renderer.device.type, dtype, enabled=dtype is not None):
            out.append(model(images).float().cpu())
    renderer.close()  # the training's own processes are enough between evaluations
    rows = [sum(map(len, share)) for share in shares]
    return group.rows_of_all(torch.cat(out) if out else torch.empty(0), rows)


def metrics(logits: Tensor, labels: Tensor, teacher: Records | None = None) -> dict[str, float]:
    """top1, top5, agreement (with the teacher's most probable class) and ece in 0..1; brier in 0..2; nll, kl in nats.

    logits [N, C]; labels [N], or empty without labels. brier: the squared distance between the probabilities and the
    one-hot label, summed over classes (Brier 1950). ece: expected calibration error of the top class over the bins of
    `reliability` (Guo et al. 2017). kl: mean KL(teacher, student) at temperature 1, the teacher's tail as modelled;
    left out where the records do not hold temperature 1.
    """
    out: dict[str, float] = {}
    if labels.numel():
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        out["top1"] = float(ranked[:, 0].float().mean())
        out["top5"] = float(ranked.any(1).float().mean())
        out["nll"] = float(F.cross_entropy(logits, labels))
        p = logits.softmax(1)
        # |p - e_y|^2 without a one-hot matrix.
        out["brier"] = float((p.square().sum(1) - 2 * p.gather(1, labels.unsqueeze(1)).squeeze(1) + 1).mean())
        count, confidence, accuracy = reliability(logits, labels).T
        out["ece"] = float((count * (accuracy - confidence).abs()).sum() / count.sum())
    if teacher is not None:
        out["agreement"] = float((logits.argmax(1) == teacher.predictions()).float().mean())
        if teacher.classes is None or 1.0 in teacher.temperatures:
            soft = teacher.softened(1.0)
            out["kl"] = float((-soft.entropy() - soft.cross(F.log_softmax(logits, 1))).mean())
    return out


def reliability(logits: Tensor, labels: Tensor) -> Tensor:
    """float64 [15, 3]: images, mean confidence and accuracy of the most probable class, by bins of its probability.

    logits [N, C]; labels [N]. The bins are (0, 1/15] to (14/15, 1], as in Guo et al. 2017 (arXiv 1706.04599). An empty
    bin has zeros.
    """
    # torchmetrics 1.9 puts a probability of exactly 1 into a bin of its own.
    confidence, predicted = logits.double().softmax(1).max(1)
    edges = torch.arange(1, _ECE_BINS, dtype=torch.float64, device=logits.device) / _ECE_BINS
    columns = torch.stack([torch.ones_like(confidence), confidence, (predicted == labels).double()], 1)
    sums = columns.new_zeros(_ECE_BINS, 3).index_add_(0, torch.bucketize(confidence, edges), columns)
    sums[:, 1:] /= sums[:, :1].clamp(min=1)
    return sums

"""What every view policy must do. A new policy gets a subclass with its name."""

import numpy as np
import torch

from kdcache.pipeline.views.policy import POLICIES, TEACHING, check_policy, draw, padding, resizes
from kdcache.pipeline.views.render import Renderer
from kdcache.tests.helpers.images import arrays_data

SIZES = np.random.default_rng(0).integers(1, 300, (90, 2)).astype(np.int32)


class PolicyContract:
    """policy: its name in POLICIES. random: whether views differ at all."""

    policy: str
    random = True

    def drawn(self, view=0, samples=range(90), seed=5, **options):
        sizes = SIZES[samples.start : samples.stop]
        return draw(self.policy, seed, view, samples, sizes, **options)

    def test_its_name_is_canonical(self):
        assert self.policy in POLICIES and check_policy(self.policy.replace(",", " , ")) == self.policy

    def test_any_range_is_drawn_without_the_others(self):
        whole = self.drawn()
        for samples in (range(0, 1), range(17, 60), range(89, 90)):
            part, same = self.drawn(samples=samples), whole[samples.start : samples.stop]
            assert np.array_equal(part.boxes, same.boxes) and np.array_equal(part.flips, same.flips)

    def test_views_seeds_and_streams_differ(self):
        digests = {
            self.drawn(v, seed=s, **o).digest() for v in (0, 1) for s in (5, 6) for o in ({}, {"stream": TEACHING})
        }
        assert len(digests) == (8 if self.random else 1)

    def test_boxes_lie_within_the_margin(self):
        drawn = self.drawn()
        assert drawn.boxes.dtype == np.int32 and drawn.flips.dtype == np.bool_ and len(drawn) == len(SIZES)
        margin = np.array([padding(self.policy, *size) for size in SIZES.tolist()])[:, None]
        corner, extent = drawn.boxes[:, :2], drawn.boxes[:, 2:]
        assert (extent >= 1).all() and (corner >= -margin).all() and (corner + extent <= SIZES + margin).all()
        assert resizes(self.policy) or np.array_equal(extent, SIZES)

    def test_a_batch_of_pixels_is_its_images_one_by_one(self):
        data = arrays_data(12, 16, 24)
        drawn = draw(self.policy, 5, 0, range(12), data.sizes)
        renderer = Renderer(data, None, torch.device("cpu"), self.policy, workers=0)
        order = np.random.default_rng(0).permutation(12)
        (batch,) = renderer.batches(drawn, [order])
        single = torch.cat(list(renderer.batches(drawn, [order[i : i + 1] for i in range(12)])))
        assert batch.shape == (12, 3, 16, 24) and torch.equal(batch, single)

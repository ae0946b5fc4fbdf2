"""What every view policy must do. A kind of policy that is new in some way gets a subclass."""

import numpy as np
import torch

from kdcache.pipeline.views.parameters import TEACHING, draw
from kdcache.pipeline.views.policy import check_policy, parse_policy
from kdcache.pipeline.views.render import Renderer
from kdcache.tests.helpers.images import arrays_data

SIZES = np.random.default_rng(0).integers(1, 300, (90, 2)).astype(np.int32)


class PolicyContract:
    """policy: its canonical text. random: whether views differ at all."""

    policy: str
    random = True
    sequence = "random"

    def drawn(self, view=0, samples=range(90), seed=5, **options):
        return draw(self.policy, seed, view, samples, SIZES, sequence=self.sequence, **options)

    def test_its_text_is_canonical(self):
        assert check_policy(self.policy.replace(",", " , ")) == self.policy

    def test_any_samples_are_drawn_without_the_others(self):
        whole, some = self.drawn(), np.random.default_rng(1).permutation(90)[:40]
        for samples in (range(0, 1), range(17, 60), range(89, 90)):
            assert self.drawn(samples=samples).digest() == whole[samples.start : samples.stop].digest()
        assert self.drawn(samples=some).digest() == whole[some].digest()

    def test_views_seeds_and_streams_differ(self):
        digests = {
            self.drawn(v, seed=s, **o).digest() for v in (0, 1) for s in (5, 6) for o in ({}, {"stream": TEACHING})
        }
        assert len(digests) == (8 if self.random else 1)

    def test_boxes_lie_within_the_margin(self):
        drawn, rule = self.drawn(), parse_policy(self.policy).geometry
        assert drawn.boxes.dtype == np.int32 and drawn.flips.dtype == np.bool_ and len(drawn) == len(SIZES)
        margin = np.array([rule.margin(*size) for size in SIZES.tolist()])[:, None]
        corner, extent = drawn.boxes[:, :2], drawn.boxes[:, 2:]
        assert (extent >= 1).all() and (corner >= -margin).all() and (corner + extent <= SIZES + margin).all()
        assert rule.resizes or np.array_equal(extent, SIZES)

    def test_a_batch_of_pixels_is_its_images_one_by_one(self):
        data = arrays_data(12, 16, 24)
        renderer = Renderer(data, None, torch.device("cpu"), self.policy, workers=0)
        order = np.random.default_rng(0).permutation(12)
        drawn = draw(self.policy, 5, 0, range(12), data.sizes, sequence=self.sequence)
        (batch,) = renderer.batches(drawn, [order])
        single = torch.cat(list(renderer.batches(drawn, [order[i : i + 1] for i in range(12)])))
        assert batch.shape == (12, 3, 16, 24) and torch.equal(batch, single)

    def test_a_part_is_rendered_as_in_the_whole(self):
        """As a build does, which draws no more than the rows of a shard."""
        data = arrays_data(13, 16, 24)
        renderer = Renderer(data, None, torch.device("cpu"), self.policy, workers=0)
        whole = draw(self.policy, 5, 6, range(13), data.sizes, sequence=self.sequence)
        part = draw(self.policy, 5, 6, range(4, 11), data.sizes, sequence=self.sequence)
        assert part.digest() == whole[4:11].digest()
        (of_part,) = renderer.batches(part, [np.array([5, 4, 10, 10])], first=4)
        (of_whole,) = renderer.batches(whole, [np.array([5, 4, 10, 10])])
        assert torch.equal(of_part, of_whole)

"""A new operation is a class and a line in the table: policies, digests and renderers then have it."""

from dataclasses import dataclass

import pytest

from kdcache.pipeline.views.draws import chance
from kdcache.pipeline.views.operations.operation import argument
from kdcache.pipeline.views.operations.pixels import on_rows
from kdcache.pipeline.views.policy import OPERATIONS, check_policy
from kdcache.tests.contracts.operations import OperationContract
from kdcache.tests.contracts.policies import PolicyContract


@dataclass(frozen=True)
class Invert:
    """With probability p, the negative of the image."""

    p: float = argument(0.1, 0, 1)

    name, stage, stream, words = "invert", "colour", 99, 1

    def draw(self, words):
        return {"on": chance(words[:, 0], self.p).astype("u1")}

    def apply(self, images, drawn):
        return on_rows(images, drawn["on"].nonzero()[0], lambda chosen, _: 255 - chosen)


class TestInvert(OperationContract):
    operation = Invert(0.5)
    drawn_digest, pixels_digest = "089e4f1fbd8c4c01", "2a81730b4307aba8"


class TestInvertInAPolicy(PolicyContract):
    policy = "crop,flip,invert(0.3),mixup(0.2)"

    @pytest.fixture(autouse=True)
    def _table(self, monkeypatch):
        monkeypatch.setitem(OPERATIONS, "invert", Invert)

    def test_it_is_applied_in_its_stage(self):
        assert check_policy("mixup(0.2),invert,erase") == "invert(0.1),erase(0.25),mixup(0.2)"

"""Machines that invent sequences of what people and crashes do to a cache; bench/machines.py runs many more of them."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from kdcache.tests.machines.buckets import Buckets
from kdcache.tests.machines.folders import Folders
from kdcache.tests.machines.world import toy

SEQUENCES, STEPS = 20, 10


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with toy(tmp_path_factory.mktemp("toy")) as found:
        yield found


@pytest.mark.parametrize("machine", [Folders, Buckets])
def test_no_sequence_gives_a_wrong_record_or_an_error_that_names_nothing(made, machine, monkeypatch):
    monkeypatch.setattr(machine, "toy", made, raising=False)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=SEQUENCES, stateful_step_count=STEPS, derandomize=True, database=None, deadline=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip

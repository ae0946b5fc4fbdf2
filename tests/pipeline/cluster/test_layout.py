"""What workers ask of a cluster, for clusters of every kind."""

import pytest

from kdcache.cache import KdcacheError
from kdcache.pipeline.cluster.layout import Layout, lay_out

SMALL, LARGE = {"CPU": 2.0, "memory": 1e9}, {"CPU": 16.0}
GPUS, GPU, HEAD = {"CPU": 64.0, "GPU": 8.0}, {"CPU": 9.0, "GPU": 1.0}, {"memory": 1e9}


@pytest.mark.parametrize(
    ("nodes", "asked", "layout"),
    [
        # Without GPUs: a CPU each, or as many as --workers says, and no processes beside a single one.
        ([SMALL], {}, Layout(gpus=0, cpus=1, decoders=0, processes=0, capacity=2)),
        ([SMALL, LARGE, HEAD], {"workers": 4}, Layout(0, 4, 0, 4, 4)),
        ([SMALL], {"workers": 0}, Layout(0, 1, 0, 0, 2)),
        # A GPU each, with its share of the node's CPUs to decode with.
        ([GPUS, GPUS, HEAD], {}, Layout(1, 8, 0, 8, 16)),
        ([GPUS, GPU], {}, Layout(1, 8, 0, 8, 9)),
        ([GPUS], {"workers": 3}, Layout(1, 3, 0, 3, 8)),
        ([GPUS], {"workers": 0}, Layout(1, 1, 0, 0, 8)),
        # Nodes with CPUs alone decode, but for data in memory, and where --workers says how many do it here.
        ([GPU, LARGE, LARGE], {}, Layout(1, 1, 40, 0, 1)),
        ([GPUS, SMALL], {}, Layout(1, 1, 8, 0, 8)),
        ([GPU, *[LARGE] * 20], {}, Layout(1, 1, 64, 0, 1)),
        ([GPUS, LARGE], {"files": False}, Layout(1, 1, 0, 1, 8)),
        ([GPUS, LARGE], {"workers": 8}, Layout(1, 8, 0, 8, 8)),
        # What is asked for counts, also where there is none of it yet.
        ([GPUS], {"device": "cpu"}, Layout(0, 1, 0, 0, 64)),
        ([HEAD], {"device": "cuda", "workers": 6}, Layout(1, 6, 0, 6, 0)),
    ],
)
def test_workers_get_what_the_nodes_have(nodes, asked, layout):
    usual = {"device": None, "workers": None, "files": True}
    found = lay_out(nodes, **{**usual, **asked})
    assert found == layout
    assert found.device == ("cuda" if layout.gpus else "cpu")


def test_the_layout_is_told_in_words():
    assert str(Layout(1, 8, 0, 8, 16)) == "1 GPU and 8 CPUs" and str(Layout(0, 1, 0, 0, 1)) == "1 CPU"


@pytest.mark.parametrize(
    ("nodes", "asked", "says"),
    [
        ([SMALL], {"device": "cuda:1"}, r"--device cuda:1 is one device, and with --ray .* give cuda or cpu"),
        ([SMALL, HEAD], {"workers": 3}, r"no node .* has 3 CPUs for a worker, the largest has 2: lower --workers"),
        ([HEAD], {}, r"the largest has 0: start nodes with CPUs, or give --device cuda to wait for GPUs"),
    ],
)
def test_what_no_node_has_is_refused(nodes, asked, says):
    with pytest.raises(KdcacheError, match=says):
        lay_out(nodes, **{"device": None, "workers": None, "files": True, **asked})

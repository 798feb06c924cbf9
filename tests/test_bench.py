"""kernels/bench.py: what is timed side by side gives the same, at small shapes."""

import pytest
import torch
from conftest import DEVICE

from kernels import bench

SHAPES = {
    "attention": [(2, 16, [3, 5], None), (2, 16, [3, 5], [4, 2])],
    "adaln": [(6, 16, 3, False)],
    "rope": [(5, 2, 16, "full")],
    "patchify": [([(2, 1, 4, 4)], (1, 2, 2))],
    "conv": [((1, 4, 2, 6, 5), 3, (3, 3, 3), True), ((1, 4, 3, 6, 5), 3, (3, 1, 1), False)],
    "linear": [(40, 8, 12), (16, 8, 12), (1, 8, 12)],
    "decode": [(4, 2, 8, [3, 40]), (4, 4, 8, [5, 5])],
    "optim": [(True, [(8, 4)] * 2), (False, [(8,), (8, 4)])],
}


@pytest.mark.parametrize("name", SHAPES)
def test_ours_and_its_peers_agree(name):
    make = bench.Make(DEVICE)
    make.dtype = torch.float32
    torch.manual_seed(0)
    cases = list(getattr(bench, f"{name}_cases")(SHAPES[name], make))
    assert len(cases) >= len(SHAPES[name])
    for case in cases:
        assert case.work > 0 and case.unit in ("GB/s", "TFLOP/s")
        with torch.no_grad():
            *peers, ours = (fn(*case.leaves) for fn in (*case.peers.values(), case.ours))
        for peer in peers:           # an optimizer's step returns nothing; the past is written last
            torch.testing.assert_close(ours, peer, rtol=1e-3, atol=1e-3)
        if case.work_both:
            bench.both_passes(case.ours, [x.requires_grad_() for x in case.leaves])()

"""kernels/linear.py against the formula; what oneDNN does not take goes to torch."""

import pytest
import torch
from conftest import DEVICE
from torch import nn

from kernels.linear import Linear, reference

SHAPES = [(0,), (1, 1), (5, 1), (2, 16), (33,)]                      # few rows, and more


def errors(y, layer, x):
    """The largest error of y, and of the formula in y's own dtype, against float64."""
    wide = [None if t is None else t.detach().double() for t in (x, layer.weight, layer.bias)]
    exact, own = reference(*wide), reference(x, layer.weight, layer.bias).detach()
    return [(each - exact).abs().max() for each in (y, own)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outs, bias", [(12, True), (16, False), (7, True)])
def test_products(shape, outs, bias):
    torch.manual_seed(0)
    layer, x = Linear(24, outs, bias).to(DEVICE), torch.randn(*shape, 24, device=DEVICE)
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(y, layer(x).detach())
    assert y.shape == (*shape, outs)
    assert y.is_contiguous()                     # or attention would leave its fast way
    if y.numel():
        ours, own = errors(y, layer, x)
        assert ours <= max(2 * own, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(dtype):
    layer, x = Linear(24, 16).to(DEVICE, dtype), torch.randn(3, 24).to(DEVICE, dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))

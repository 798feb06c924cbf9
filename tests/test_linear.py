"""kernels/linear.py against the formula; what oneDNN does not take goes to torch."""

import pytest
import torch
from conftest import DEVICE
from torch import nn

from kernels import linear as MODULE
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


@pytest.mark.skipif(DEVICE != "cpu", reason="a CPU's path")
@pytest.mark.parametrize("is_wide", [True, False])
def test_large_products_with_gradients(is_wide, monkeypatch):
    """As convolutions of one pixel, where the CPU is one that gains by them."""
    calls, conv2d = [], torch.nn.functional.conv2d
    monkeypatch.setattr(MODULE, "IS_WIDE", is_wide)
    monkeypatch.setattr(MODULE.F, "conv2d", lambda *args: (calls.append(1), conv2d(*args))[1])
    torch.manual_seed(0)
    layer, x = Linear(512, 512), torch.randn(2, 128, 512, requires_grad=True)
    y, plain = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    assert len(calls) == is_wide and y.is_contiguous()
    ours, own = errors(y.detach(), layer, x)
    assert ours <= 2 * own
    leaves = (x, layer.weight, layer.bias)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (y, plain))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    layer(x[:, :100])                                                # 2^26 multiply-adds or fewer
    assert len(calls) == is_wide


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(dtype):
    layer, x = Linear(24, 16).to(DEVICE, dtype), torch.randn(3, 24).to(DEVICE, dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))

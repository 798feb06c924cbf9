"""kernels/conv.py: causal convolutions in chunks, fused norm and Winograd by the formula."""

import pytest
import torch
from conftest import DEVICE

from kernels import conv as MODULE
from kernels.conv import causal_conv3d, norm_silu, reference, regroup, winograd

CASES = [(c_in, c_out, kernel, with_gamma)          # widths from 96 on may go by Winograd
         for c_in, c_out, kernel in ((5, 7, (3, 3, 3)), (96, 98, (3, 3, 3)), (6, 4, (1, 3, 3)),
                                     (4, 6, (3, 1, 1)), (3, 4, (1, 1, 1))) for with_gamma in (0, 1)]


def make(c_in, c_out, kernel, frames=7, size=(16, 18), dtype=torch.float64):
    generator = torch.Generator().manual_seed(c_in)
    randn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    tensors = (randn(2, c_in, frames, *size), randn(c_out, c_in, *kernel), randn(c_out),
               randn(c_in) + 1)
    return [x.to(DEVICE, dtype) for x in tensors]


@pytest.mark.parametrize("c_in, c_out, kernel, with_gamma", CASES)
def test_chunks_are_the_formula(c_in, c_out, kernel, with_gamma):
    """In float32 within twice the formula's own error; Winograd, which only some go by, within 3e-6."""
    x, weight, bias, gamma = make(c_in, c_out, kernel)
    exact, last = reference(x, weight, bias, None, gamma if with_gamma else None)
    x, weight, bias, gamma = (y.float() for y in (x, weight, bias, gamma))
    gamma = gamma if with_gamma else None
    own = (reference(x, weight, bias, None, gamma)[0] - exact).abs().max()
    for chunks in ((7,), (1, 2, 4), (3, 4), (1, 1, 3, 2)):
        parts, past = [], None
        with torch.no_grad():
            for part in x.split(chunks, 2):
                before = part.clone()
                y, past = causal_conv3d(part, weight, bias, past, gamma)
                parts.append(y)
                assert torch.equal(part, before)                 # what is given stays as it is
        error = (torch.cat(parts, 2) - exact).abs().max()
        assert error <= max(2 * own, 3e-6 * exact.abs().max())
        if kernel[0] == 1:
            assert past is None
        else:
            torch.testing.assert_close(past, last.float())


@pytest.mark.parametrize("c_in, c_out, kernel, with_gamma", CASES)
def test_gradients_are_the_formulas(c_in, c_out, kernel, with_gamma):
    """Through the chunk before, too."""
    leaves = [x.requires_grad_() for x in make(c_in, c_out, kernel)][:3 + with_gamma]

    def run(fn):
        past, out = None, []
        for part in leaves[0].split((3, 4), 2):
            y, past = fn(part, *leaves[1:3], past, *leaves[3:])
            out.append(y)
        return torch.cat(out, 2)
    ours, plain = run(causal_conv3d), run(reference)
    torch.testing.assert_close(ours, plain)
    seed = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(ours, leaves, seed), torch.autograd.grad(plain, leaves, seed)):
        torch.testing.assert_close(a, b)


def test_the_past_is_no_view():
    """Of a long chunk only the last frames stay in memory."""
    x, weight, bias, gamma = make(4, 6, (3, 1, 1), 9)
    with torch.no_grad():
        _, past = causal_conv3d(x, weight, bias, None, gamma)
        assert past.untyped_storage().nbytes() == past.numel() * past.element_size()


def test_gradients_of_the_fused_norm():
    x, past = (torch.randn(2, 3, n, 1, 2, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    gamma = torch.rand(3, dtype=torch.float64, requires_grad=True)
    run = lambda x, gamma, past: norm_silu(x, gamma, past, 2)
    assert torch.autograd.gradcheck(run, (x, gamma, past))
    assert torch.equal(norm_silu(x, gamma, None, 2)[:, :, :2], torch.zeros_like(past))


@pytest.mark.skipif(not MODULE.HAS_ONEDNN, reason="needs oneDNN")
@pytest.mark.parametrize("shape, strip", [((1, 32, 4, 16, 16), 2**18), ((2, 33, 6, 17, 20), 5000),
                                          ((1, 40, 8, 5, 9), 1)])
def test_winograd_is_the_convolution(shape, strip):
    x, weight, bias = torch.randn(shape), torch.randn(37, shape[1], 3, 3, 3), torch.randn(37)
    exact = torch.nn.functional.conv3d(x.double(), weight.double(), bias.double(), padding=(0, 1, 1))
    y = winograd(x.unbind(2), weight, bias, strip)
    assert y.shape == exact.shape and (y - exact).abs().max() < 3e-6 * exact.abs().max()


@pytest.mark.skipif(DEVICE != "cpu" or not MODULE.HAS_ONEDNN, reason="oneDNN's path")
def test_winograd_takes_only_what_it_is_made_for(monkeypatch):
    calls = []
    monkeypatch.setattr(MODULE, "winograd", lambda frames, *rest: calls.append(len(frames)))
    run = lambda frames=2, size=16, c=96, kernel=(3, 3, 3), past=2, dtype=torch.float32: causal_conv3d(
        torch.randn(1, c, frames, size, size, dtype=dtype), torch.randn(c, c, *kernel, dtype=dtype),
        torch.zeros(c, dtype=dtype), past and torch.randn(1, c, past, size, size, dtype=dtype))
    with torch.no_grad():
        run(), run(4)
        assert calls == [4, 6]
        run(3), run(size=15), run(c=95), run(past=None), run(dtype=torch.float64)
        run(kernel=(3, 1, 1))
    run()                                                        # with gradients
    assert calls == [4, 6]


def test_chunks_are_regrouped(monkeypatch):
    """A level makes 100 numbers a frame, of which 450 are wanted: 4 frames, the first one alone."""
    monkeypatch.setattr(MODULE, "CHUNK", 450)
    x = torch.randn(1, 2, 12, 5, 5)
    for sizes in ((12,), (1, 1, 10), (5, 0, 7), (2,) * 6):
        with torch.no_grad():
            result = list(regroup(x.split(sizes, 2), 2, True))
            assert [part.shape[2] for part in result] == [1, 4, 4, 3]
            assert torch.equal(torch.cat(result, 2), x)
            later = [part.shape[2] for part in regroup(x.split(sizes, 2), 2, False)]
            assert later == [4, 4, 4]
        assert [part.shape[2] for part in regroup([x], 2, True)] == [12]         # with gradients

"""kernels/patchify.py: both backends against the formula, there and back, the operators."""

import subprocess
import sys

import pytest
import torch
from conftest import DEVICE, ROOT, compiled

from kernels import patchify as MODULE
from kernels.patchify import patchify, reference, unpatchify

CASES = [
    ([(4, 1, 8, 8), (4, 3, 4, 6), (4, 2, 10, 2)], (1, 2, 2)),
    ([(3, 4, 6, 6)], (2, 2, 3)),
    ([(16, 5, 7, 3), (16, 1, 1, 1)], (1, 1, 1)),
    ([(1, 2, 34, 70), (1, 4, 2, 2)], (2, 2, 2)),
]


def make(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shapes, patch", CASES)
def test_is_the_formula_and_its_inverse(backend, shapes, patch, dtype):
    latents = make(shapes, dtype)
    tokens = patchify(latents, patch)
    assert torch.equal(tokens, reference(latents, patch))
    for a, b in zip(unpatchify(tokens, shapes, patch), latents, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shapes, patch", CASES)
def test_gradients_go_back_to_their_place(backend, shapes, patch):
    latents = [z.requires_grad_() for z in make(shapes)]
    tokens = patchify(latents, patch)
    seed = torch.randn_like(tokens)
    for a, b in zip(torch.autograd.grad(tokens, latents, seed), unpatchify(seed, shapes, patch)):
        assert torch.equal(a, b)
    leaf = tokens.detach().requires_grad_()
    out = unpatchify(leaf, shapes, patch)
    seeds = [torch.randn_like(z) for z in out]
    assert torch.equal(torch.autograd.grad(out, leaf, seeds)[0], patchify(seeds, patch))


@pytest.mark.slow
@pytest.mark.parametrize("shapes, patch", MODULE.CPU_SHAPES + [([(48, 3, 32, 64)], (1, 2, 2)),
                                                               ([(16, 4, 32, 32)], (4, 16, 16))])
def test_grid(backend, shapes, patch):
    test_is_the_formula_and_its_inverse(backend, shapes, patch, torch.bfloat16)


def test_strided_latents(backend):
    latents = [torch.randn(6, 4, 8, 2, device=DEVICE).permute(3, 1, 0, 2) for _ in range(2)]
    tokens = patchify(latents, (2, 2, 2))
    assert torch.equal(tokens, reference(latents, (2, 2, 2)))
    back = unpatchify(tokens.t().contiguous().t(), [z.shape for z in latents], (2, 2, 2))
    assert all(torch.equal(a, b) for a, b in zip(back, latents))


def test_operators():
    pytest.importorskip("triton")
    shapes, patch = CASES[0]
    flat = torch.cat([z.flatten() for z in make(shapes)]).requires_grad_()
    numbers = [s for shape in shapes for s in shape]
    torch.library.opcheck(MODULE._patchify, (flat, numbers, list(patch)))
    tokens = patchify(make(shapes), patch).requires_grad_()
    torch.library.opcheck(MODULE._unpatchify, (tokens, numbers, list(patch)))


def test_compiled_is_eager(backend):
    shapes, patch = CASES[0]

    def run(*latents):
        tokens = patchify(latents, patch)
        return sum(z.square().sum() for z in unpatchify(tokens * tokens, shapes, patch))

    results = []
    for fn in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [z.requires_grad_() for z in make(shapes)]
        out = fn(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("match, call", [
    (r"latents\[1\] .*multiples", lambda: patchify(make([(4, 1, 4, 4), (4, 1, 3, 4)]), (1, 2, 2))),
    (r"latents\[1\]", lambda: patchify(make([(4, 1, 4, 4), (3, 1, 4, 4)]), (1, 2, 2))),
    (r"latents\[1\]", lambda: patchify([*make([(1, 1, 1, 1)]), torch.ones(1, 1)], (1, 1, 1))),
    (r"latents\[0\] .*C above 0", lambda: patchify(make([(0, 1, 4, 4)]), (1, 2, 2))),
    ("patch must be", lambda: patchify(make([(4, 1, 4, 4)]), (2, 2))),
    ("latents must be", lambda: patchify([], (1, 2, 2))),
    (r"shapes\[0\] must be", lambda: unpatchify(torch.ones(4, 16), [(4, 1, 4, 5)], (1, 2, 2))),
    ("tokens must be", lambda: unpatchify(torch.ones(5, 16), [(4, 1, 4, 4)], (1, 2, 2))),
])
def test_wrong_input_names_the_argument(match, call):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.slow
def test_bench_prints_a_table():
    command = [sys.executable, "-m", "kernels.bench"]
    done = subprocess.run([*command, "patchify"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ceilings" in done.stdout and done.stdout.count("GB/s") >= 3
    done = subprocess.run([*command, "softmax"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "softmax" in done.stderr and done.stderr.count("\n") == 1


def launch_all():
    """The kernel at the widths that we ship, for the compile test."""
    for dtype in (torch.bfloat16, torch.float32):
        for channels in (4, 16, 48):
            x = torch.empty(channels * 4 * 8 * 8, dtype=dtype)
            for cut in (True, False):
                shaped = x if cut else x.view(64, -1)
                MODULE._triton_copy(shaped, [channels, 4, 8, 8], [1, 2, 2], cut)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_compiles_without_spills(arch):
    compiled("test_patchify", arch)

"""kernels/adaln.py: both backends against float64, runs of rows, determinism, the operator."""

import pytest
import torch
from conftest import DEVICE, check_against_reference, compiled

from kernels import adaln as MODULE
from kernels.adaln import gate_residual_ln_modulate, ln_modulate, reference


def make(n, width, n_rows, dtype=torch.float32, table_dtype=None, runs=True, offset=0.0):
    """x, y, gate, shift, scale, rows. The last table row belongs to no token."""
    generator = torch.Generator().manual_seed(n + width)
    shapes = [(n, width), (n, width), *[(n_rows, width)] * 3]
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    tensors[0] += offset
    rows = torch.randint(0, max(n_rows - 1, 1), (n,), generator=generator)
    rows = rows.sort().values if runs else rows
    dtypes = [dtype] * 2 + [table_dtype or dtype] * 3
    return [x.to(DEVICE, d) for x, d in zip(tensors, dtypes)] + [rows.int().to(DEVICE)]


def compare(x, y, gate, shift, scale, rows, rms=False):
    check_against_reference(
        ["h", "dx", "dshift", "dscale"], [x, shift, scale],
        lambda x, shift, scale: (ln_modulate(x, shift, scale, rows, rms=rms),),
        lambda x, shift, scale, upcast: (reference(x, shift, scale, rows, rms=rms, upcast=upcast),))
    check_against_reference(
        ["r", "h", "dx", "dy", "dgate", "dshift", "dscale"], [x, y, gate, shift, scale],
        lambda x, y, *tables: gate_residual_ln_modulate(x, y, *tables, rows, rms=rms),
        lambda x, y, gate, shift, scale, upcast: reference(x, shift, scale, rows, y, gate, rms=rms,
                                                           upcast=upcast))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, width, n_rows, runs", [
    (1, 72, 1, True), (300, 24, 2, True), (97, 72, 3, True), (217, 72, 5, False), (1023, 32, 40, True),
    (20, 1152, 3, True)])
def test_matches_float64(backend, dtype, n, width, n_rows, runs):
    compare(*make(n, width, n_rows, dtype, runs=runs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_matches_float64(backend, dtype):
    tensors = make(97, 72, 3, dtype, offset=0.5)
    compare(*tensors, rms=True)
    x, _, _, shift, scale, rows = tensors
    h = ln_modulate(x, torch.zeros_like(shift), torch.zeros_like(scale), rows, rms=True)
    torch.testing.assert_close(h, torch.nn.functional.rms_norm(x, (72,), eps=1e-6))


def test_wide_table_with_narrow_tokens(backend):
    x, y, gate, shift, scale, rows = make(50, 64, 3, torch.bfloat16, torch.float32)
    r, h = gate_residual_ln_modulate(x, y, gate, shift, scale, rows)
    want = reference(x, shift, scale, rows, y, gate, upcast=torch.float64)
    assert r.dtype == h.dtype == torch.bfloat16
    torch.testing.assert_close(r, want[0])
    torch.testing.assert_close(h, want[1], rtol=2e-2, atol=2e-2)


def test_offset_and_constant_tokens(backend):
    x, y, gate, shift, scale, rows = make(40, 96, 3, offset=100.0)
    x[3] = 5.0  # no variance: eps decides, and h is the shift
    if backend == "triton":  # torch's own layer_norm, which the other path is, cancels digits here
        compare(x, y, gate, shift, scale, rows)
    h = ln_modulate(x, shift, scale, rows)
    torch.testing.assert_close(h[3], shift[int(rows[3])])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [24, 768, 1536, 6144])
@pytest.mark.parametrize("n_rows, runs", [(1, True), (7, True), (30, False)])
def test_grid(backend, dtype, width, n_rows, runs):
    compare(*make(70, width, n_rows, dtype, runs=runs))


def gradients(tensors, rows, seeds):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = gate_residual_ln_modulate(*leaves, rows)
    return [o.detach() for o in out] + list(torch.autograd.grad(out, leaves, seeds))


def test_reruns_give_the_same_bits(backend):
    *tensors, rows = make(200, 48, 6, runs=False)
    seeds = [torch.randn_like(tensors[0]) for _ in range(2)]
    first = gradients(tensors, rows, seeds)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(tensors, rows, seeds)))


def test_h_is_ln_modulate_of_r(backend):
    x, y, gate, shift, scale, rows = make(60, 40, 3, torch.bfloat16)
    r, h = gate_residual_ln_modulate(x, y, gate, shift, scale, rows)
    assert torch.equal(h, ln_modulate(r, shift, scale, rows))


def test_tokens_are_alone(backend):
    x, y, gate, shift, scale, rows = make(90, 40, 4)
    r, h = gate_residual_ln_modulate(x, y, gate, shift, scale, rows)
    part = slice(31, 77)
    r2, h2 = gate_residual_ln_modulate(x[part], y[part], gate, shift, scale, rows[part])
    assert torch.equal(r[part], r2) and torch.equal(h[part], h2)
    x[:31] = float("nan")
    assert torch.equal(gate_residual_ln_modulate(x, y, gate, shift, scale, rows)[1][31:], h[31:])


def test_zero_gate_is_identity(backend):
    x, y, gate, shift, scale, rows = make(30, 40, 4)
    r, _ = gate_residual_ln_modulate(x, y, torch.zeros_like(gate), shift, scale, rows)
    assert torch.equal(r, x)


def test_the_first_tokens_nan_stays_in_its_row(backend):
    """In backward a tile's spare places stand for token 0."""
    *tensors, rows = make(30, 40, 4)
    seeds = [torch.randn_like(tensors[0]) for _ in range(2)]
    for seed in seeds:
        seed[rows == rows[0]] = 0
    clean = gradients(tensors, rows, seeds)
    tensors[0][0] = float("nan")
    poisoned = gradients(tensors, rows, seeds)
    keep = rows != rows[0]
    for a, b in zip(clean[:4], poisoned[:4]):
        assert torch.equal(a[keep], b[keep])
    others = torch.arange(4, device=DEVICE) != rows[0]
    for a, b in zip(clean[4:], poisoned[4:]):
        assert torch.equal(a[others], b[others]) and b[others].isfinite().all()


def test_unused_row_gets_zero_gradient(backend):
    *tensors, rows = make(30, 40, 4)
    seeds = [torch.ones_like(tensors[0])] * 2
    for grad in gradients(tensors, rows, seeds)[-3:]:
        assert not grad[-1].any() and grad[:-1].any()


def test_strided_views(backend):
    x, y, *tables, rows = make(50, 40, 4)
    table = torch.stack(tables, 1)
    wide = torch.stack((x, y), 2)
    seeds = [torch.randn_like(x) for _ in range(2)]
    strided = gradients([*wide.unbind(2), *table.unbind(1)], rows, seeds)
    dense = gradients([x, y, *tables], rows, seeds)
    assert all(torch.equal(a, b) for a, b in zip(strided, dense))


def test_operator():
    pytest.importorskip("triton")
    x, y, gate, shift, scale, rows = make(20, 16, 3)
    for t in (x, y, gate, shift, scale):
        t.requires_grad_()
    torch.library.opcheck(MODULE._adaln, (x, y, gate, shift, scale, rows, 1e-6, False))
    torch.library.opcheck(MODULE._adaln, (x, None, None, shift, scale, rows, 1e-6, True))


def test_compiled_is_eager(backend):
    *tensors, rows = make(33, 24, 3)

    def run(x, y, gate, shift, scale):
        r, h = gate_residual_ln_modulate(x, y, gate, shift, scale, rows)
        return (r * h + ln_modulate(h, shift, scale, rows)).sum()

    results = []
    for fn in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = fn(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name, change", [
    ("x", lambda a: a | {"x": a["x"][0]}),
    ("x", lambda a: {name: t[:, :0] if t.dim() == 2 else t for name, t in a.items()}),
    ("shift", lambda a: a | {name: a[name][:0] for name in ("gate", "shift", "scale")}),
    ("y", lambda a: a | {"y": a["y"].bfloat16()}),
    ("gate", lambda a: a | {"gate": a["gate"][1:]}),
    ("scale", lambda a: a | {"scale": a["scale"][:, 1:]}),
    ("rows", lambda a: a | {"rows": a["rows"].long()}),
    ("rows", lambda a: a | {"rows": a["rows"][1:]}),
])
def test_wrong_input_names_the_argument(name, change):
    args = dict(zip(("x", "y", "gate", "shift", "scale", "rows"), make(10, 8, 3)))
    with pytest.raises(ValueError, match=f"^{name} must be"):
        gate_residual_ln_modulate(**change(args))


def launch_all():
    """Every kernel at the widths that we ship, for the compile test."""
    rows = torch.zeros(128, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        for width in (256, 1152, 3072, 5120):
            x, table = torch.empty(128, width, dtype=dtype), torch.empty(4, width, dtype=dtype)
            for y, gate in ((None, None), (x, table)):
                _, h, stats = MODULE._triton_forward(x, y, gate, table, table, rows, 1e-6, False)
                MODULE._triton_backward(h, h, x, y, gate, table, rows, stats.zero_(), False)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_compiles_without_spills(arch):
    assert all(made["wide"] for made in compiled("test_adaln", arch, stack=80).values())

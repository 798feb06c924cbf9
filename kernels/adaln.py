"""Adaptive LayerNorm: norm and modulation by a table, with or without the gated residual before it.

    ln_modulate                  x^ = (x - mean) * rstd     h = x^ * (1 + scale[rows]) + shift[rows]
    gate_residual_ln_modulate    r = x + gate[rows] * y     h = ln_modulate(r)

with mean and rstd = 1 / sqrt(var + eps) over the width D, in float32, no affine part. With `rms`
the norm is RMSNorm: the mean is 0, and var the mean square. Backward, given dh (and dr):

    g = dh * (1 + scale)         dx = rstd * (g - mean(g) - x^ * mean(g * x^)) (+ dr)
                                 (with rms without mean(g))
    dshift[row] = sum dh         dscale[row] = sum dh * x^         sums over the tokens of that row
    dy = gate * dx               dgate[row] = sum dx * y

Layout: x, y [N, D], float32, bfloat16 or float16 (float64 on the torch path); shift,
scale, gate [R, D] in one dtype of their own, any row stride; rows int32 [N], each in 0..R-1, in any
order. h is computed from r as it is stored, so that gate_residual_ln_modulate(x, y, ...) returns
ln_modulate of its own r, bit for bit. Triton saves for backward x or r, y, mean and rstd (8 bytes a
token). Table gradients have two stages: tokens are sorted by row (stable) and cut into tiles of 64
of one row, each leaves its sums, and each row adds its tiles in order: no atomics, the same bits.

Measured on an H100 (a copy: 2961 GB/s), bfloat16 with float32 tables of 256 tokens a row, GB/s of
the bytes that must move in gate_residual_ln_modulate, forward / backward: 16384 x 1152 2404 / 1952,
32768 x 1152 2552 / 2058, 32768 x 3072 2806 / 2198.
"""

from typing import Optional

import torch
import torch.nn.functional as F

from kernels import (check, indices, kept, launch, power_of_2, tile_table, tl, triton,
                     use_triton)

TILE = 64  # tokens whose table gradients one program sums

# (N, D, tokens a run, whether RMSNorm): bench
SHAPES = [(32768, 1152, 256, False), (16384, 1152, 4096, False), (32768, 1536, 1024, False),
          (32768, 3072, 4096, False), (4096, 5120, 512, False), (32768, 3072, 4096, True)]
CPU_SHAPES = [(1024, 128, 32, False), (2048, 256, 50, False), (4096, 256, 50, False),
              (2048, 256, 50, True)]


def reference(x, shift, scale, rows, y=None, gate=None, eps=1e-6, rms=False, upcast=torch.float32):
    """The definition of right: h, or (r, h) where y and gate are given."""
    wide = lambda t: t if upcast is None else t.to(upcast)
    r = wide(x) if y is None else wide(x) + wide(gate)[rows.long()] * wide(y)
    mean = 0 if rms else r.mean(1, keepdim=True)
    var = ((r - mean) ** 2).mean(1, keepdim=True)
    normed = (r - mean) / torch.sqrt(var + eps)
    h = normed * (1 + wide(scale)[rows.long()]) + wide(shift)[rows.long()]
    return h.to(x.dtype) if y is None else (r.to(x.dtype), h.to(x.dtype))


# ---- the torch path

class _Gather(torch.autograd.Function):
    """table[rows], whose gradient sums the tokens of each row in ascending order: indexing's own
    adds one token at a time."""

    @staticmethod
    def forward(ctx, table, rows):
        ctx.save_for_backward(rows)
        ctx.n_rows, ctx.dtype = table.shape[0], table.dtype
        return table.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad):
        rows, = ctx.saved_tensors
        ordered, order = torch.sort(rows, stable=True)
        row_numbers = torch.arange(ctx.n_rows, device=rows.device, dtype=rows.dtype)
        first = torch.searchsorted(ordered, row_numbers)
        return F.embedding_bag(order, grad, first, mode="sum").to(ctx.dtype), None


def _ln_modulate_torch(x, shift, scale, rows, eps, rms):
    # in float32 whatever the input, so that h is rounded once
    wide = torch.promote_types(x.dtype, torch.float32)
    shift, scale = (_Gather.apply(t.to(wide), rows) for t in (shift, scale))
    normed = (F.rms_norm if rms else F.layer_norm)(x.to(wide), x.shape[1:], eps=eps)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def _gate_residual_torch(x, y, gate, rows):
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.addcmul(x.to(wide), _Gather.apply(gate.to(wide), rows), y.to(wide)).to(x.dtype)


# ---- the Triton kernels

@triton.jit
def _forward_kernel(x, y, gate, shift, scale, rows, r, h, stats, N, D, gate_row, shift_row,
                    scale_row, eps, GATED: tl.constexpr, RMS: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_D: tl.constexpr):
    """BLOCK_M tokens a program, a whole width each: x (and y) read once, h (and r) written once."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_D)[None, :]
    ok = (token < N)[:, None] & (col < D)
    at = token[:, None] * D + col
    row = tl.load(rows + token, mask=token < N, other=0).to(tl.int64)[:, None]
    z = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    if GATED:
        g = tl.load(gate + row * gate_row + col, mask=ok, other=0.0).to(tl.float32)
        z += g * tl.load(y + at, mask=ok, other=0.0).to(tl.float32)
        rounded = z.to(r.dtype.element_ty)
        tl.store(r + at, rounded, mask=ok)
        z = rounded.to(tl.float32)
    if RMS:
        mean = tl.zeros([BLOCK_M], tl.float32)
    else:
        mean = tl.sum(z, 1) / D
    away = tl.where(ok, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(away * away, 1) / D + eps)
    tl.store(stats + token * 2, mean, mask=token < N)
    tl.store(stats + token * 2 + 1, rstd, mask=token < N)
    plus = tl.load(shift + row * shift_row + col, mask=ok, other=0.0).to(tl.float32)
    times = tl.load(scale + row * scale_row + col, mask=ok, other=0.0).to(tl.float32)
    out = away * rstd[:, None] * (1 + times) + plus
    tl.store(h + at, out.to(h.dtype.element_ty), mask=ok)


@triton.jit
def _backward_kernel(dh, dr, r, y, gate, scale, stats, order, tiles, dx, dy, partial, D, gate_row,
                     scale_row, R, GATED: tl.constexpr, RMS: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_D: tl.constexpr):
    """A tile of tokens of one table row: their dx (and dy), and their part of its gradients."""
    tile = tl.program_id(0).to(tl.int64)
    row = tl.load(tiles + tile * 3).to(tl.int64)
    first = tl.load(tiles + tile * 3 + 1)
    last = tl.load(tiles + tile * 3 + 2)
    col = tl.arange(0, BLOCK_D)
    in_row = (col < D) & (row < R)  # spare tiles have row R
    times = 1 + tl.load(scale + row * scale_row + col, mask=in_row, other=0.0).to(tl.float32)
    sum_shift = tl.zeros([BLOCK_D], tl.float32)
    sum_scale = tl.zeros([BLOCK_D], tl.float32)
    sum_gate = tl.zeros([BLOCK_D], tl.float32)
    if GATED:
        opened = tl.load(gate + row * gate_row + col, mask=in_row, other=0.0).to(tl.float32)
    for start in range(first, last, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        token = tl.load(order + place, mask=place < last, other=0)
        ok = (place < last)[:, None] & (col < D)[None, :]
        at = token[:, None] * D + col[None, :]
        # of places behind the last, zeros: token 0 stands there, and 0 * its NaN is NaN
        mean = tl.load(stats + token * 2, mask=place < last, other=0.0)[:, None]
        rstd = tl.load(stats + token * 2 + 1, mask=place < last, other=0.0)[:, None]
        z = tl.load(r + at, mask=ok, other=0.0).to(tl.float32)
        normed = (z - mean) * rstd
        grad = tl.load(dh + at, mask=ok, other=0.0).to(tl.float32)
        sum_shift += tl.sum(grad, 0)
        sum_scale += tl.sum(grad * normed, 0)
        g = grad * times[None, :]
        mean_gx = (tl.sum(g * normed, 1) / D)[:, None]
        if not RMS:
            g -= (tl.sum(g, 1) / D)[:, None]
        back = rstd * (g - normed * mean_gx)
        if GATED:
            back += tl.load(dr + at, mask=ok, other=0.0).to(tl.float32)
            sum_gate += tl.sum(back * tl.load(y + at, mask=ok, other=0.0).to(tl.float32), 0)
            tl.store(dy + at, (back * opened[None, :]).to(dy.dtype.element_ty), mask=ok)
        tl.store(dx + at, back.to(dx.dtype.element_ty), mask=ok)
    part = partial + tile * 3 * D + col
    tl.store(part, sum_shift, mask=in_row)
    tl.store(part + D, sum_scale, mask=in_row)
    if GATED:
        tl.store(part + 2 * D, sum_gate, mask=in_row)


@triton.jit
def _sum_kernel(partial, first_tile, dshift, dscale, dgate, D, GATED: tl.constexpr,
                BLOCK_D: tl.constexpr):
    """A table row's gradients: its tiles' parts, summed in ascending order."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = col < D
    sum_shift = tl.zeros([BLOCK_D], tl.float32)
    sum_scale = tl.zeros([BLOCK_D], tl.float32)
    sum_gate = tl.zeros([BLOCK_D], tl.float32)
    first = tl.load(first_tile + row)
    part = partial + first.to(tl.int64) * 3 * D + col
    for _ in range(first, tl.load(first_tile + row + 1)):
        sum_shift += tl.load(part, mask=ok, other=0.0)
        sum_scale += tl.load(part + D, mask=ok, other=0.0)
        if GATED:
            sum_gate += tl.load(part + 2 * D, mask=ok, other=0.0)
        part += 3 * D
    at = row * D + col
    tl.store(dshift + at, sum_shift.to(dshift.dtype.element_ty), mask=ok)
    tl.store(dscale + at, sum_scale.to(dscale.dtype.element_ty), mask=ok)
    if GATED:
        tl.store(dgate + at, sum_gate.to(dgate.dtype.element_ty), mask=ok)


def _config(D, is_forward):
    """Rows and columns of a program, and its warps: fastest on an H100 at 1152 and 3072."""
    columns = power_of_2(D)
    rows = min(max(4096 // columns, 2), TILE) if columns <= 4096 else 1
    warps = min(max(rows * columns // 2048, 1), 8) if is_forward else 8
    return dict(BLOCK_M=rows, BLOCK_D=columns, num_warps=warps)


def _triton_forward(x, y, gate, shift, scale, rows, eps, rms):
    N, D = x.shape
    rows = indices("rows", rows, len(scale) - 1)
    h = x.new_empty(x.shape)
    r = x.new_empty(x.shape if y is not None else 0)
    stats = x.new_empty((N, 2), dtype=torch.float32)
    config = _config(D, True)
    gated = y is not None
    y, gate = (y, gate) if gated else (x, scale)  # pointers that are not followed
    launch(_forward_kernel, (triton.cdiv(N, config["BLOCK_M"]),), x, y, gate, shift, scale, rows, r,
           h, stats, N, D, gate.stride(0), shift.stride(0), scale.stride(0), eps, GATED=gated,
           RMS=rms, **config)
    return r, h, stats


def _by_row(rows, R):
    """(the tokens in the order of their rows, tiles of them, each row's first tile)"""
    ordered, order = torch.sort(rows, stable=True)
    row_numbers = torch.arange(R + 1, device=rows.device, dtype=torch.int32)
    tiles = tile_table(torch.searchsorted(ordered, row_numbers), TILE, len(rows))
    return order, tiles, torch.searchsorted(tiles[:, 0].contiguous(), row_numbers)


def _triton_backward(dh, dr, r, y, gate, scale, rows, stats, rms):
    D, R = r.shape[1], len(scale)
    gated = y is not None
    dx = r.new_empty(r.shape)
    dy = r.new_empty(r.shape if gated else 0)
    dshift, dscale, dgate = (scale.new_empty((R, D) if n < 2 or gated else 0) for n in range(3))
    rows = indices("rows", rows, R - 1)
    order, tiles, first_tile = kept(rows, lambda: _by_row(rows, R), R)
    partial = r.new_empty((len(tiles), 3, D), dtype=torch.float32)
    y, gate, dr = (y, gate, dr) if gated else (r, scale, dh)  # pointers that are not followed
    launch(_backward_kernel, (len(tiles),), dh, dr, r, y, gate, scale, stats, order, tiles, dx, dy,
           partial, D, gate.stride(0), scale.stride(0), R, GATED=gated, RMS=rms,
           **_config(D, False))
    launch(_sum_kernel, (R, triton.cdiv(D, 256)), partial, first_tile, dshift, dscale, dgate, D,
           GATED=gated, BLOCK_D=256, num_warps=2)
    return dx, dy, dshift, dscale, dgate


# ---- the operator, for Triton; ln_modulate has None for y and gate, and empty outputs for theirs

@torch.library.custom_op("nanosora::adaln", mutates_args=())
def _adaln(x: torch.Tensor, y: Optional[torch.Tensor], gate: Optional[torch.Tensor],
           shift: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor, eps: float,
           rms: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _triton_forward(x, y, gate, shift, scale, rows, eps, rms)


@_adaln.register_fake
def _(x, y, gate, shift, scale, rows, eps, rms):
    stats = x.new_empty((len(x), 2), dtype=torch.float32)
    return x.new_empty(0 if y is None else x.shape), x.new_empty(x.shape), stats


@torch.library.custom_op("nanosora::adaln_backward", mutates_args=())
def _adaln_backward(
        dh: torch.Tensor, dr: torch.Tensor, r: torch.Tensor, y: Optional[torch.Tensor],
        gate: Optional[torch.Tensor], scale: torch.Tensor, rows: torch.Tensor, stats: torch.Tensor,
        rms: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _triton_backward(dh, dr, r, y, gate, scale, rows, stats, rms)


@_adaln_backward.register_fake
def _(dh, dr, r, y, gate, scale, rows, stats, rms):
    dy = r.new_empty(0 if y is None else r.shape)
    dshift, dscale = scale.new_empty(scale.shape), scale.new_empty(scale.shape)
    dgate = scale.new_empty(0 if y is None else scale.shape)
    return r.new_empty(r.shape), dy, dshift, dscale, dgate


def _setup(ctx, inputs, output):
    x, y, gate, _, scale, rows, _, ctx.rms = inputs
    r, _, stats = output
    ctx.save_for_backward(x if y is None else r, y, gate, scale, rows, stats)


def _backward(ctx, dr, dh, _):
    dx, dy, dshift, dscale, dgate = _adaln_backward(
        dh.contiguous(), dr.contiguous(), *ctx.saved_tensors, ctx.rms)
    if ctx.saved_tensors[1] is None:
        dy = dgate = None
    return dx, dy, dgate, dshift, dscale, None, None, None


_adaln.register_autograd(_backward, setup_context=_setup)


# ---- public

def _dense(table):
    """Table rows may lie any stride apart (a view of [R, 6, D]), their numbers may not."""
    return table if table.stride(1) == 1 else table.contiguous()


def _check(x, tables, rows):
    check(x.dim() == 2 and x.shape[1] > 0 and x.dtype.is_floating_point, "x", x,
          "floating point [N, D] with D > 0")
    like = tables["shift"]
    for name, t in tables.items():
        check(t.dim() == 2 and t.shape[1] == x.shape[1] and t.shape == like.shape and len(t), name,
              t, f"[R, {x.shape[1]}], the same R > 0 in all tables")
        check(t.dtype.is_floating_point and t.dtype == like.dtype and t.device == x.device, name, t,
              f"floating point on {x.device} like x, one dtype for all tables")
    check(rows.shape == x.shape[:1] and rows.dtype == torch.int32 and rows.device == x.device,
          "rows", rows, f"int32 [{len(x)}] on {x.device}")


def ln_modulate(x, shift, scale, rows, eps=1e-6, rms=False):
    """norm(x) * (1 + scale[rows]) + shift[rows], h [N, D] in x's dtype.

    x [N, D]; shift, scale [R, D]; rows int32 [N], the table row of each token; rms: the norm is
    RMSNorm, not LayerNorm. Raises ValueError naming the argument whose shape, dtype or device does
    not fit. (adaLN: Peebles and Xie 2023; RMSNorm: Zhang and Sennrich 2019.)
    """
    _check(x, {"shift": shift, "scale": scale}, rows)
    if use_triton(x, shift):
        shift, scale = (_dense(t) for t in (shift, scale))
        return _adaln(x.contiguous(), None, None, shift, scale, rows, eps, rms)[1]
    return _ln_modulate_torch(x, shift, scale, rows, eps, rms)


def gate_residual_ln_modulate(x, y, gate, shift, scale, rows, eps=1e-6, rms=False):
    """r = x + gate[rows] * y and h = ln_modulate(r): (r, h), both [N, D] in x's dtype.

    x, y [N, D]; gate, shift, scale [R, D]; rows int32 [N]; rms as there. Raises ValueError naming
    the argument that does not fit.
    """
    _check(x, {"shift": shift, "scale": scale, "gate": gate}, rows)
    check(y.shape == x.shape and y.dtype == x.dtype and y.device == x.device, "y", y,
          f"{x.dtype} {list(x.shape)} on {x.device} like x")
    if use_triton(x, shift):
        gate, shift, scale = (_dense(t) for t in (gate, shift, scale))
        return _adaln(x.contiguous(), y.contiguous(), gate, shift, scale, rows, eps, rms)[:2]
    r = _gate_residual_torch(x, y, gate, rows)
    return r, _ln_modulate_torch(r, shift, scale, rows, eps, rms)

"""QK RMSNorm and 3D rotary positions, in one pass over the projection.

For a token n with x [A, E] (its q or its k), weight w [A*E] or [E], coordinates (t, y, x) in c [3]:

    x^ = x * rstd, rstd = 1 / sqrt(mean(x^2) + eps) over all A*E channels, or over each head's E
    z = w x^ (without a weight there is no norm, z = x)
    pair i of each head turns by a_i = c[axes[i]] * freqs[i]:
        out[2i] = z[2i] cos a_i - z[2i+1] sin a_i
        out[2i+1] = z[2i] sin a_i + z[2i+1] cos a_i

Backward: turn the gradient back (by -a_i) to dz; then

    dw = sum over tokens of dz x^         dx = rstd * (w dz - x^ mean(w dz x^))

Layout: q, k [N, A, E], of any stride over N (others are copied), so parts of a packed [N, 3, A, E]
are read in place; outputs are fresh and contiguous. coords float32 [N, 3]; freqs float32 [E/2] (0 =
this pair stays), axes int32 [E/2] in 0..2. Coordinates and frequencies get no gradient. Angles are
float32: at coordinates of 10^4 they are right to about 10^-3. Saved for backward: q and k as they
came.

Measured on an H100 (a copy: 2961 GB/s), bfloat16, GB/s of the bytes that must move for q and k,
forward / backward: 32768 x 24 x 128 1420 / 1432, 16384 x 16 x 72 1067 / 693. Angles are computed
anew for each head, which costs more than the bytes.
"""

from typing import Optional

import torch

from kernels import check, indices, launch, row_tiles, tl, triton, use_triton

TOKENS = 64  # whose part of the weights' gradient one program sums

# (N, A, E, what the norm is over: "full" width, each "head", or None): bench
SHAPES = [(32768, 16, 72, "full"), (16384, 12, 128, "full"), (32768, 24, 128, "full"),
          (32768, 16, 72, None), (32768, 24, 128, "head")]
CPU_SHAPES = [(1024, 4, 32, "full"), (2048, 8, 32, "full"), (4096, 8, 32, "full"),
              (2048, 8, 32, "head")]


def reference(q, k, coords, freqs, axes, q_weight=None, k_weight=None, eps=1e-6,
              upcast=torch.float32):
    """The definition of right, by the formula."""
    wide = lambda t: t if upcast is None else t.to(upcast)
    angle = (wide(coords)[:, axes.long()] * wide(freqs))[:, None]
    out = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        z = wide(x)
        if weight is not None:
            full = len(weight) == z.shape[1] * z.shape[2]
            mean_square = (z * z).mean((1, 2) if full else 2, keepdim=True)
            z = z / torch.sqrt(mean_square + eps) * wide(weight).view(-1, z.shape[2])
        even, odd = z[..., 0::2], z[..., 1::2]
        turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
        out.append(torch.stack(turned, -1).flatten(-2).to(x.dtype))
    return tuple(out)


# ---- the torch path

class _Norm(torch.autograd.Function):
    """RMSNorm of x [N, D]: F.rms_norm's own backward takes some four times as long on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        square = torch.linalg.vector_norm(x, dim=1, keepdim=True).square()
        rstd = torch.rsqrt(square / x.shape[1] + eps)
        ctx.save_for_backward(x, rstd, weight)
        return x * rstd * weight

    @staticmethod
    def backward(ctx, grad):
        x, rstd, weight = ctx.saved_tensors
        normed = x * rstd
        product = grad * normed
        mean = (product @ weight / x.shape[1])[:, None]
        return rstd * torch.addcmul(grad * weight, normed, mean, value=-1), product.sum(0), None


def _norm_rope_torch(x, turn, weight, eps):
    """turn complex [N, 1, E/2]: a product of complex numbers is the fastest rotation on a CPU."""
    z = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    if weight is not None:
        z = _Norm.apply(z.view(-1, len(weight)), weight.to(z.dtype), eps).view_as(z)
    z = torch.view_as_complex(z.unflatten(2, (-1, 2))) * turn
    return torch.view_as_real(z).flatten(2).to(x.dtype)


# ---- the Triton kernels

@triton.jit
def _turns(coords, freqs, axes, token, ok, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr):
    """cos and sin [tokens, BLOCK_P] of every pair of every head, computed and not read: in float32
    they would be twice the bytes of q."""
    pair = tl.arange(0, BLOCK_P) % PAIRS
    axis = tl.load(axes + pair)
    place = tl.load(coords + token[:, None] * 3 + axis[None, :], mask=ok[:, None], other=0.0)
    angle = place * tl.load(freqs + pair)[None, :]
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def _turn(z, cos, sin, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    even, odd = tl.split(tl.reshape(z, [BLOCK_M, BLOCK_W // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK_M, BLOCK_W])


@triton.jit
def _forward_kernel(x, out, coords, freqs, axes, weight, N, x_row, eps, PARTS: tl.constexpr,
                    W: tl.constexpr, E: tl.constexpr, NORMED: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_W: tl.constexpr):
    """BLOCK_M of N parts a program: a part is what one norm is over, W channels of a token."""
    part = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = part // PARTS
    col = tl.arange(0, BLOCK_W)
    ok = (part < N)[:, None] & (col < W)[None, :]
    at = (token * x_row + part % PARTS * W)[:, None] + col[None, :]
    z = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    if NORMED:
        rstd = tl.rsqrt(tl.sum(z * z, 1) / W + eps)
        w = tl.load(weight + col, mask=col < W, other=0.0).to(tl.float32)
        z = z * rstd[:, None] * w[None, :]
    cos, sin = _turns(coords, freqs, axes, token, part < N, E // 2, BLOCK_W // 2)
    z = _turn(z, cos, sin, BLOCK_M, BLOCK_W)
    tl.store(out + part[:, None] * W + col[None, :], z.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _backward_kernel(dout, x, coords, freqs, axes, weight, dx, partial, N, x_row, eps,
                     PARTS: tl.constexpr, W: tl.constexpr, E: tl.constexpr, NORMED: tl.constexpr,
                     TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """TOKENS of N parts a program, BLOCK_M at a time: dx, and their share of dw."""
    col = tl.arange(0, BLOCK_W)
    in_row = col < W
    dw = tl.zeros([BLOCK_W], tl.float32)
    if NORMED:
        w = tl.load(weight + col, mask=in_row, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    for start in range(0, TOKENS, BLOCK_M):
        part = first + start + tl.arange(0, BLOCK_M)
        token = part // PARTS
        ok = (part < N)[:, None] & in_row[None, :]
        out_at = part[:, None] * W + col[None, :]
        cos, sin = _turns(coords, freqs, axes, token, part < N, E // 2, BLOCK_W // 2)
        grad = tl.load(dout + out_at, mask=ok, other=0.0).to(tl.float32)
        grad = _turn(grad, cos, -sin, BLOCK_M, BLOCK_W)
        if NORMED:
            at = (token * x_row + part % PARTS * W)[:, None] + col[None, :]
            z = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(z * z, 1) / W + eps)[:, None]
            z = z * rstd
            dw += tl.sum(grad * z, 0)
            grad = grad * w[None, :]
            grad = rstd * (grad - z * (tl.sum(grad * z, 1) / W)[:, None])
        tl.store(dx + out_at, grad.to(dx.dtype.element_ty), mask=ok)
    if NORMED:
        tl.store(partial + tl.program_id(0).to(tl.int64) * W + col, dw, mask=in_row)


def _config(x, weight):
    """How x [N, A, E] is cut: whole tokens, or heads where the weight is a head's."""
    width = x.shape[1] * x.shape[2] if weight is None else len(weight)
    tile = zip(("BLOCK_M", "BLOCK_W", "num_warps"), row_tiles(width, TOKENS))
    return dict(tile, PARTS=x.shape[1] * x.shape[2] // width, W=width, E=x.shape[2],
                NORMED=weight is not None)


def _triton_forward(x, coords, freqs, axes, weight, eps):
    out = x.new_empty(x.shape)
    config = _config(x, weight)
    n = len(x) * config["PARTS"]
    axes = indices("axes", axes, 2)
    launch(_forward_kernel, (triton.cdiv(n, config["BLOCK_M"]),), x, out, coords, freqs, axes,
           freqs if weight is None else weight, n, x.stride(0), eps, **config)
    return out


def _triton_backward(dout, x, coords, freqs, axes, weight, eps):
    dx = x.new_empty(x.shape)
    config = _config(x, weight)
    n = len(x) * config["PARTS"]
    n_programs = triton.cdiv(n, TOKENS)
    partial = x.new_empty((n_programs if weight is not None else 0, config["W"]),
                          dtype=torch.float32)
    axes = indices("axes", axes, 2)
    launch(_backward_kernel, (n_programs,), dout, x, coords, freqs, axes,
           freqs if weight is None else weight, dx, partial, n, x.stride(0), eps, TOKENS=TOKENS,
           **config)
    # torch's sum runs in a fixed order
    return dx, x.new_empty(0) if weight is None else partial.sum(0).to(weight.dtype)


# ---- the operator, for Triton; without a weight its gradient is empty

@torch.library.custom_op("nanosora::qk_norm_rope", mutates_args=())
def _qk_norm_rope(q: torch.Tensor, k: torch.Tensor, coords: torch.Tensor, freqs: torch.Tensor,
                  axes: torch.Tensor, q_weight: Optional[torch.Tensor],
                  k_weight: Optional[torch.Tensor],
                  eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    where = coords, freqs, axes
    return _triton_forward(q, *where, q_weight, eps), _triton_forward(k, *where, k_weight, eps)


@_qk_norm_rope.register_fake
def _(q, k, coords, freqs, axes, q_weight, k_weight, eps):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("nanosora::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
        dq: torch.Tensor, dk: torch.Tensor, q: torch.Tensor, k: torch.Tensor, coords: torch.Tensor,
        freqs: torch.Tensor, axes: torch.Tensor, q_weight: Optional[torch.Tensor],
        k_weight: Optional[torch.Tensor], eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dq_weight = _triton_backward(dq, q, coords, freqs, axes, q_weight, eps)
    dk, dk_weight = _triton_backward(dk, k, coords, freqs, axes, k_weight, eps)
    return dq, dk, dq_weight, dk_weight


@_qk_norm_rope_backward.register_fake
def _(dq, dk, q, k, coords, freqs, axes, q_weight, k_weight, eps):
    weights = (q.new_empty(0) if w is None else w.new_empty(w.shape) for w in (q_weight, k_weight))
    return q.new_empty(q.shape), k.new_empty(k.shape), *weights


def _setup(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dq, dk):
    saved = ctx.saved_tensors
    dq, dk, dq_weight, dk_weight = _qk_norm_rope_backward(dq.contiguous(), dk.contiguous(), *saved,
                                                          ctx.eps)
    return (dq, dk, None, None, None, None if saved[5] is None else dq_weight,
            None if saved[6] is None else dk_weight, None)


_qk_norm_rope.register_autograd(_backward, setup_context=_setup)


# ---- public

def qk_norm_rope(q, k, coords, freqs, axes, q_weight=None, k_weight=None, eps=1e-6):
    """RMSNorm (where a weight is given), then rotation: (q', k') [N, A, E].

    q, k [N, A, E]; coords float32 [N, 3] = (t, y, x); freqs float32 [E/2]; axes int32 [E/2] in
    0..2; weights [A*E], for a norm over the full width, or [E], over each head, or None. Adjacent
    pairs (2i, 2i+1) turn by coords[n, axes[i]] * freqs[i]. Raises ValueError naming the argument
    that does not fit. (RoPE: Su et al. 2021; RMSNorm: Zhang and Sennrich 2019.)
    """
    check(q.dim() == 3 and q.dtype.is_floating_point and q.shape[1] > 0 and q.shape[2] > 0
          and q.shape[2] % 2 == 0, "q", q, "floating point [N, A, E], A > 0, E even and above 0")
    check(k.shape == q.shape and k.dtype == q.dtype and k.device == q.device, "k", k,
          f"{q.dtype} {list(q.shape)} on {q.device} like q")
    n_pairs = q.shape[2] // 2
    for name, x, shape, dtype in (("coords", coords, (len(q), 3), torch.float32),
                                  ("freqs", freqs, (n_pairs,), torch.float32),
                                  ("axes", axes, (n_pairs,), torch.int32)):
        check(x.shape == shape and x.dtype == dtype and x.device == q.device, name, x,
              f"{dtype} {list(shape)} on {q.device}")
    for name, x in (("q_weight", q_weight), ("k_weight", k_weight)):
        full, head = q.shape[1] * q.shape[2], q.shape[2]
        fits = x is None or (x.shape in ((full,), (head,)) and x.device == q.device)
        check(fits, name, x, f"None, [{full}] or [{head}] on {q.device}")
    if use_triton(q):
        q, k = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q, k))
        coords, freqs = coords.contiguous(), freqs.contiguous()
        q_weight, k_weight = (w if w is None else w.contiguous() for w in (q_weight, k_weight))
        return _qk_norm_rope(q, k, coords, freqs, axes, q_weight, k_weight, eps)
    wide = torch.promote_types(q.dtype, torch.float32)
    angle = (coords.to(wide).index_select(1, axes) * freqs)[:, None]
    turn = torch.complex(angle.cos(), angle.sin())
    return _norm_rope_torch(q, turn, q_weight, eps), _norm_rope_torch(k, turn, k_weight, eps)

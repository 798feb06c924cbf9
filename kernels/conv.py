"""Causal 3D convolutions with their norm and activation.

With RMS norm over the channels and SiLU in front, where gamma [C] is given, and behind the last
KT - 1 frames of the chunk before (zeros before the first chunk):

    h[t] = silu(gamma * sqrt(C) * x[t] / |x[t]|)
    y[t] = bias + sum over k < KT of weight[:, :, k] (*) h[t - (KT - 1) + k]   (*): 2D, zero-padded

Layout: x [B, C, T, H, W], weight [D, C, KT, KH, KW] with odd KH and KW, y [B, D, T, H, W]. The past
[B, C, KT - 1, H, W] is h, as the convolution reads it; the call returns the next chunk's.

norm_silu writes where the convolution reads: behind the frames of the past, on a CPU in
channels_last_3d. One operation in the place of six touches memory half as often. Saved for
backward: x, gamma and the norm's scale [B, 1, T, H, W]. Backward, with n = scale x, u = gamma n and
du = dh silu'(u):  dgamma = sum du n,  dx = scale (gamma du - n mean over C of (gamma du n)).

On a CPU in float32:
- oneDNN's convolution always: torch takes another one for a chunk of a single clip, which was 2 to
  13 times slower.
- The first frame of a clip sees zeros before it: only the kernel's last frame is multiplied.
- Without gradients, for kernels of 3 x 3 x 3 and at least 96 channels, an even number of frames of
  256 pixels or more goes by Winograd's F(2, 3) over time (Lavin and Gray, arXiv 1509.09308): two
  frames take four products of a frame in the place of six, in strips of rows that stay in the
  cache.

Shares of a stage's time that each wins alone (two cores; AVX-512, AVX2): Winograd at width 96 15%
and 9%, but -42% at 32 to 64, where it is not used; the first frame 11% and 8%; oneDNN's convolution
3 to 31% and up to 29%. norm_silu wins 8% or less, and a training step takes a seventh less memory.
What lost: 2x upsampling folded into the kernel that follows it (4 products in the place of 9), 5%
or less; the next past written where the last one lay, nothing.

Limits: Winograd has no gradients; its error stays below 3e-6 of the largest value in the tests.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from kernels import HAS_ONEDNN

CHUNK = 2**21           # numbers of the largest tensor that a chunk makes in a level, about

# (x's shape, D, kernel, whether it is a later chunk): for the bench
SHAPES = [((1, 96, 4, 120, 208), 96, (3, 3, 3), True), ((1, 384, 2, 60, 104), 384, (3, 3, 3), True),
          ((8, 96, 9, 64, 64), 96, (3, 3, 3), False)]
CPU_SHAPES = [((1, 32, 4, 64, 96), 32, (3, 3, 3), True), ((1, 96, 2, 32, 48), 96, (3, 3, 3), True),
              ((8, 64, 3, 8, 8), 64, (3, 3, 3), False)]


def reference(x, weight, bias, past=None, gamma=None):
    """(y, next past), by the formula."""
    if gamma is not None:
        unit = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
        x = F.silu(unit * x.shape[1]**0.5 * gamma.view(-1, 1, 1, 1))
    n, (KH, KW) = weight.shape[2] - 1, weight.shape[3:]
    past = x.new_zeros(*x.shape[:2], n, *x.shape[3:]) if past is None else past
    x = torch.cat([past, x], 2)
    return F.conv3d(x, weight, bias, padding=(0, KH // 2, KW // 2)), x[:, :, x.shape[2] - n:]


# ---- norm and activation

class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, past, n_past):
        B, C, T, H, W = x.shape
        layout = torch.channels_last_3d if x.device.type == "cpu" else torch.contiguous_format
        out = torch.empty((B, C, n_past + T, H, W), dtype=x.dtype, device=x.device,
                          memory_format=layout)
        out[:, :, :n_past] = 0 if past is None else past
        size = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(
            x.dtype, torch.float32))
        scale = (C**0.5 / size.clamp_min(1e-12)).to(x.dtype)
        h = torch.mul(x, scale, out=out[:, :, n_past:])
        F.silu(h.mul_(gamma.view(-1, 1, 1, 1)), inplace=True)
        ctx.save_for_backward(x, gamma, scale)
        ctx.n_past = n_past
        return out

    @staticmethod
    def backward(ctx, grad):
        x, gamma, scale = ctx.saved_tensors
        d_past, grad = grad[:, :, :ctx.n_past], grad[:, :, ctx.n_past:]
        unit, weight = x * scale, gamma.view(-1, 1, 1, 1)
        u = unit * weight
        sigmoid = torch.sigmoid(u)
        du = sigmoid * (u * (1 - sigmoid)).add_(1) * grad
        d_gamma = torch.einsum("bcthw,bcthw->c", du, unit)
        du = du.mul_(weight)
        inner = (du * unit).mean(1, keepdim=True)
        dx = du.sub_(unit.mul_(inner)).mul_(scale)
        return dx, d_gamma, d_past if ctx.needs_input_grad[2] else None, None


def norm_silu(x, gamma, past=None, n_past=0):
    """silu(RMS norm(x)) of x [B, C, T, H, W] behind the n_past frames of `past` (None: zeros):
    [B, C, n_past + T, H, W]."""
    return _NormSiLU.apply(x, gamma, past, n_past)


# ---- convolutions

def _uses_onednn(x):
    return HAS_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel()


def conv3d(x, weight, bias, stride=(1, 1, 1), padding=(0, 1, 1)):
    """F.conv3d; on a CPU in float32 always oneDNN's."""
    if _uses_onednn(x):
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


class Conv3d(nn.Conv3d):
    """nn.Conv3d by `conv3d`."""

    def forward(self, x):
        return conv3d(x, self.weight, self.bias, self.stride, self.padding)


def winograd(frames, weight, bias, strip=2**18):
    """The convolution of 2 n + 2 frames [B, C, H, W] on a CPU with a kernel [D, C, 3, 3, 3], padded
    in space: [B, D, 2 n, H, W]. A strip of rows has about `strip` numbers. No gradients."""
    (B, C, H, W), (first, centre, last) = frames[0].shape, weight.unbind(2)
    kernels = weight.new_empty(4, len(weight), 3, 3, C).permute(0, 1, 4, 2, 3)
    kernels[0], kernels[3] = first, last
    torch.add(first, last, out=kernels[1]).div_(2)
    torch.sub(kernels[1], centre, alpha=0.5, out=kernels[2])
    kernels[1].add_(centre, alpha=0.5)
    n = -(-H // -(-H * W * B * C // strip))
    rows = weight.new_empty(B, n + 2, W, C).permute(0, 3, 1, 2)
    out = weight.new_empty(B, len(frames) - 2, H, W, len(weight)).permute(0, 4, 1, 2, 3)
    for t, top in itertools.product(range(0, len(frames) - 2, 2), range(0, H, n)):
        end = min(H, top + n)
        above, below = max(0, top - 1), min(H, end + 1)           # a row of zeros lies beyond
        a, b, c, d = (frame[:, :, above:below] for frame in frames[t:t + 4])
        part = rows[:, :, :end - top + 2]
        inner = part[:, :, above - top + 1:below - top + 1]
        part[:, :, 0], part[:, :, -1] = 0, 0

        def product(i, combine, one, other, bias=None):
            combine(one, other, out=inner)
            return torch.mkldnn_convolution(part, kernels[i], bias, (0, 1), (1, 1), (1, 1), 1)

        even, odd = out[:, :, t, top:end], out[:, :, t + 1, top:end]
        both, differ = product(1, torch.add, b, c, bias), product(2, torch.sub, c, b)
        torch.add(both, differ, out=even).add_(product(0, torch.sub, a, c))
        torch.sub(both, differ, out=odd).sub_(product(3, torch.sub, b, d))
    return out


def _is_winograd(x, weight, past):
    D, C, *kernel = weight.shape
    return (past is not None and kernel == [3, 3, 3] and min(C, D) >= 96     # where it is faster
            and x.shape[2] % 2 == 0 and x.shape[3] * x.shape[4] >= 256 and _uses_onednn(x)
            and not torch.is_grad_enabled())


def causal_conv3d(x, weight, bias, past=None, gamma=None):
    """(y, next past) of x [B, C, T, H, W]: the convolution of x, or with `gamma` of
    silu(RMS norm(x)), with the present and past frames. past: what the call for the chunk before
    returned, None before the first chunk. A kernel of one frame has no past: None."""
    n = weight.shape[2] - 1
    if _is_winograd(x, weight, past):
        x = x if gamma is None else norm_silu(x, gamma)
        is_own = gamma is not None and x.shape[2] == n           # all of it, and nobody else's
        y = winograd([*past.unbind(2), *x.unbind(2)], weight, bias)
        return y, x if is_own else x[:, :, -n:].clone()
    if gamma is not None:
        x = norm_silu(x, gamma, past, n)
    elif n:
        B, C, _, H, W = x.shape
        x = torch.cat([x.new_zeros(B, C, n, H, W) if past is None else past, x], 2)
    last = x[:, :, -n:] if n else None
    if n and not torch.is_grad_enabled():
        last = last.clone()                                      # a view would keep all of x
    if past is None and x.shape[2] == n + 1:                     # before a first frame all is zero
        x, weight = x[:, :, n:], weight[:, :, -1:]
    return conv3d(x, weight, bias, padding=(0, weight.shape[3] // 2, weight.shape[4] // 2)), last


def regroup(chunks, growth, is_first):
    """Chunks [B, C, T, H, W] of a clip, joined or cut in time, for a level that makes `growth`
    times as many numbers of them: about CHUNK of these, an even number of frames. So memory does
    not grow with T, and no convolution is called on too little at once. A clip's first frame comes
    alone, for a third of another's products. With gradients all frames come at once."""
    held, n = [], 0
    for chunk in chunks:
        frame = chunk.shape[0] * chunk.shape[1] * chunk.shape[3] * chunk.shape[4]
        most_frames = max(2, int(CHUNK / growth // max(1, frame)) // 2 * 2)
        while chunk.shape[2]:
            wanted = chunk.shape[2] if torch.is_grad_enabled() else 1 if is_first else most_frames
            part, chunk = chunk[:, :, :wanted - n], chunk[:, :, wanted - n:]
            held, n = held + [part], n + part.shape[2]
            if n == wanted:
                part, held, n = torch.cat(held, 2) if len(held) > 1 else part, [], 0
                is_first = False
                yield part
    if n:
        yield torch.cat(held, 2)

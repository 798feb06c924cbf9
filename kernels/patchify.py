"""Latents of any shapes to packed tokens, and back.

A latent [C, T, H, W] is cut into patches (pt, ph, pw). Token (t, y, x) holds the features

    token[c, i, j, l] = latent[c, t pt + i, y ph + j, x pw + l]

in that order; tokens run in (t, y, x) order, clips end to end: [N, C*pt*ph*pw]. Each number of a
latent is one number of a token, so patchify and unpatchify are inverse permutations and each is the
other's backward. Any dtype; on Triton float32, bfloat16 and float16.

Measured on an H100: four latents of 4 x 16 x 64 x 64 in 0.037 ms, most of it the launch.
"""

import functools
import math

import torch

from kernels import check, launch, row_tiles, tl, triton, use_triton

# (shapes of the latents, patch): bench and tests
SHAPES = [
    ([(16, 1, 32, 32)] * 128, (1, 2, 2)),
    ([(16, 16, 32, 32)] * 8, (1, 2, 2)),
    ([(4, 16, 32, 32)] * 8, (1, 2, 2)),
    ([(16, 21, 60, 104), (16, 1, 90, 160), (16, 9, 40, 40)] * 2, (1, 2, 2)),
]
CPU_SHAPES = [([(4, 4, 8, 8), (4, 1, 16, 12), (4, 6, 10, 6)] * 8, (1, 2, 2))]


def reference(latents, patch):
    """The definition of right: one token at a time."""
    pt, ph, pw = patch
    tokens = []
    for z in latents:
        _, n_frames, height, width = z.shape
        for t in range(0, n_frames, pt):
            for y in range(0, height, ph):
                for x in range(0, width, pw):
                    tokens.append(z[:, t:t + pt, y:y + ph, x:x + pw].reshape(-1))
    return torch.stack(tokens)


# ---- the torch path

def _cut(latent, patch):
    channels, n_frames, height, width = latent.shape
    pt, ph, pw = patch
    cells = latent.reshape(channels, n_frames // pt, pt, height // ph, ph, width // pw, pw)
    return cells.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, channels * pt * ph * pw)


def _join(tokens, shape, patch):
    channels, n_frames, height, width = shape
    pt, ph, pw = patch
    cells = tokens.reshape(n_frames // pt, height // ph, width // pw, channels, pt, ph, pw)
    return cells.permute(3, 0, 4, 1, 5, 2, 6).reshape(shape)


# ---- the Triton kernel

@triton.jit
def _copy_kernel(flat, tokens, clips, tiles, K, C, pt, ph, pw, CUT: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_N tokens of one clip: from flat latents to tokens if CUT, else the other way."""
    tile = tiles + tl.program_id(0) * 2
    clip = clips + tl.load(tile) * 6
    base, first_token, count = tl.load(clip), tl.load(clip + 1), tl.load(clip + 2)
    # the clip's size in patches; int64, and so is every address made of it
    frames, rows, cols = tl.load(clip + 3), tl.load(clip + 4), tl.load(clip + 5)
    n = tl.load(tile + 1) + tl.arange(0, BLOCK_N)[:, None]
    f = tl.arange(0, BLOCK_K)[None, :]
    ok = (n < count) & (f < K)
    c = f // (pt * ph * pw)
    frame = n // (rows * cols) * pt + f // (ph * pw) % pt
    row = n // cols % rows * ph + f // pw % ph
    col = n % cols * pw + f % pw
    in_flat = flat + base + ((c * frames * pt + frame) * rows * ph + row) * cols * pw + col
    in_tokens = tokens + (first_token + n) * K + f
    if CUT:
        tl.store(in_tokens, tl.load(in_flat, mask=ok), mask=ok)
    else:
        tl.store(in_flat, tl.load(in_tokens, mask=ok), mask=ok)


@functools.lru_cache(maxsize=64)
def _tables(shapes, patch, block_n, device):
    """What _copy_kernel reads, kept because every step of a fixed shape asks again.

    Clips int64 [B, 6]: start in the flat buffer, first token, tokens, size in patches. Tiles int32
    [tiles, 2], one for every block_n tokens of a clip: clip, first token in it.
    """
    clips, tiles, base, token = [], [], 0, 0
    for b, (channels, *size) in enumerate(shapes):
        cells = [s // p for s, p in zip(size, patch)]
        count = math.prod(cells)
        clips.append((base, token, count, *cells))
        tiles += [(b, first) for first in range(0, count, block_n)]
        base, token = base + channels * math.prod(size), token + count
    return torch.tensor(clips).to(device), torch.tensor(tiles, dtype=torch.int32).to(device)


def _triton_copy(x, shapes, patch, cut):
    """x is the flat buffer or the tokens; returns the other."""
    shapes = _unflat(shapes)
    features = shapes[0][0] * math.prod(patch)
    block_n, block_k, _ = row_tiles(features, 64)
    clips, tiles = _tables(shapes, tuple(patch), block_n, x.device)
    out = x.new_empty((x.numel() // features, features) if cut else x.numel())
    flat, tokens = (x, out) if cut else (out, x)
    launch(_copy_kernel, (len(tiles),), flat, tokens, clips, tiles, features, shapes[0][0], *patch,
           CUT=cut, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4)
    return out


def _unflat(shapes):
    """Operators take flat lists: C, T, H, W of each clip in turn."""
    return tuple(tuple(shapes[i:i + 4]) for i in range(0, len(shapes), 4))


# ---- the operators, for Triton: each the other's backward

@torch.library.custom_op("nanosora::patchify", mutates_args=())
def _patchify(flat: torch.Tensor, shapes: list[int], patch: list[int]) -> torch.Tensor:
    return _triton_copy(flat, shapes, patch, cut=True)


@_patchify.register_fake
def _(flat, shapes, patch):
    features = shapes[0] * math.prod(patch)
    return flat.new_empty((flat.numel() // features, features))


@torch.library.custom_op("nanosora::unpatchify", mutates_args=())
def _unpatchify(tokens: torch.Tensor, shapes: list[int], patch: list[int]) -> torch.Tensor:
    return _triton_copy(tokens, shapes, patch, cut=False)


@_unpatchify.register_fake
def _(tokens, shapes, patch):
    return tokens.new_empty(tokens.numel())


def _setup(ctx, inputs, output):
    _, ctx.shapes, ctx.patch = inputs


def _patchify_backward(ctx, grad):
    return _unpatchify(grad.contiguous(), ctx.shapes, ctx.patch), None, None


def _unpatchify_backward(ctx, grad):
    return _patchify(grad.contiguous(), ctx.shapes, ctx.patch), None, None


_patchify.register_autograd(_patchify_backward, setup_context=_setup)
_unpatchify.register_autograd(_unpatchify_backward, setup_context=_setup)


# ---- public

def _check(shapes, patch, name):
    check(len(patch) == 3 and min(patch) > 0, "patch", patch, "(pt, ph, pw), each at least 1")
    check(len(shapes) > 0, name, shapes, "a list of at least one clip")
    for i, shape in enumerate(shapes):
        fits = len(shape) == 4 and shape[0] == shapes[0][0] > 0 and not any(
            s % p for s, p in zip(shape[1:], patch))
        check(fits, f"{name}[{i}]", tuple(shape),
              f"[{shapes[0][0]}, T, H, W], C above 0, T, H, W multiples of patch {tuple(patch)}")


def patchify(latents, patch):
    """Packed tokens [N, C*pt*ph*pw] of latents [C, T, H, W] of any shapes, clips end to end.

    patch: (pt, ph, pw) in latent frames and cells. Raises ValueError naming the latent whose shape,
    dtype or device does not fit.
    """
    _check([z.shape for z in latents], patch, "latents")
    for i, z in enumerate(latents):
        check(z.dtype == latents[0].dtype and z.device == latents[0].device, f"latents[{i}]", z,
              f"{latents[0].dtype} on {latents[0].device} like latents[0]")
    if use_triton(latents[0]):
        flat = torch.cat([z.reshape(-1) for z in latents])
        return _patchify(flat, [s for z in latents for s in z.shape], list(patch))
    return torch.cat([_cut(z, patch) for z in latents])


def unpatchify(tokens, shapes, patch):
    """The inverse: a list of latents [C, T, H, W] of the given shapes from tokens [N, C*pt*ph*pw].

    N must be the tokens of all shapes together. Raises ValueError naming the argument that does not
    fit.
    """
    _check(shapes, patch, "shapes")
    features = shapes[0][0] * math.prod(patch)
    counts = [math.prod(shape) // features for shape in shapes]
    check(tokens.shape == (sum(counts), features), "tokens", tokens,
          f"[{sum(counts)}, {features}] for these shapes")
    if use_triton(tokens):
        flat = _unpatchify(tokens.contiguous(), [s for shape in shapes for s in shape], list(patch))
        sizes = [math.prod(shape) for shape in shapes]
        return [part.view(*shape) for part, shape in zip(flat.split(sizes), shapes)]
    return [_join(part, shape, patch) for part, shape in zip(tokens.split(counts), shapes)]

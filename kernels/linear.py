"""Linear layers on a CPU: y = x W^T + b.

Layout: x [..., K], W [M, K], b [M] or None, y [..., M]. torch gives matrix products on a CPU to
MKL; in float32 without gradients oneDNN's own linear layer, which has no backward, is faster:
without it captioning 16 clips took 6% (AVX-512) to 20% (AVX2) longer, one clip 4 to 10%.

What lost (two quiet cores, share of its stage's time that it won): products with parts of the
weights for up to 32 rows, at most 9%; copies of the weights by columns for one row, -9%; q, k, v
and gate, up as one product each, at most 9%; with gradients a convolution of one pixel, 4%.
"""

import torch
import torch.nn.functional as F
from torch import nn

from kernels import HAS_ONEDNN

# (rows, K, M): for the bench
SHAPES = [(4096, 1152, 4608), (16, 4096, 4096), (1, 4096, 4096)]
CPU_SHAPES = [(512, 384, 1536), (16, 768, 2048), (1, 768, 2048)]


def reference(x, weight, bias=None):
    """The formula."""
    y = x @ weight.T
    return y if bias is None else y + bias


def linear(x, weight, bias=None):
    """F.linear of x [..., K], weight [M, K]; on a CPU in float32 without gradients by oneDNN."""
    if (not HAS_ONEDNN or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32
            or not x.numel() * len(weight) or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)

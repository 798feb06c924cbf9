"""Muon and AdamW over many tensors at once.

AdamW (Loshchilov and Hutter, 1711.05101), with the gradient g and the step's number n:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        p = (1 - lr wd) p   (matrices only)
    p = p - lr m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + 1e-8)

Muon (Jordan et al. 2024, github.com/KellerJordan/Muon) of a matrix [M, N]; a convolution is one of
[C_out, C_in * kernel]:

    m = b m + (1 - b) g          u = b m + (1 - b) g            x = u / |u|
    5 times  x = 3.4445 x + (2.0315 s^2 - 4.7750 s) x,  s = x x^T     (to the nearest orthogonal)
    p = (1 - lr wd) p - lr 0.2 sqrt(max(M, N)) x

An orthogonal update is scaled to the root mean square of AdamW's (Liu et al. 2025, 2502.16982), so
one learning rate serves both. torch.optim.Muon takes 2D parameters only.

Layout: parameters of any shape, float32; the state of each is step, exp_avg and exp_avg_sq, or
momentum. AdamW's tensors go as one list (torch._foreach), matrices of one shape as one batch.

Muon's products are bfloat16, of which the errors only perturb the direction; on CPUs without
bfloat16, where they would be emulated, float32: a step of the demo's autoencoder went from 1.5 s to
0.45 s.

Limits: no sparse gradients, no closures. Not a torch.optim.Optimizer: the first of those imports
torch's compiler, seconds.
"""

from collections import defaultdict

import torch

# (whether Muon steps, the parameters' shapes): for the bench
SHAPES = [(True, [(1152, 1152)] * 64), (False, [(1152,)] * 256 + [(1152, 4608)] * 8)]
CPU_SHAPES = [(True, [(128, 128)] * 24), (True, [(512, 128)] * 8),
              (False, [(128,)] * 64 + [(512, 128)] * 4)]


def reference(p, grad, state, lr, step, is_muon, betas=(0.9, 0.99), momentum=0.95,
              weight_decay=0.01):
    """The formula, for one parameter: its value after the step. state: {key: tensor}, updated."""
    zeros = torch.zeros_like(p)
    if is_muon:
        m = state["momentum"] = momentum * state.get("momentum", zeros) + (1 - momentum) * grad
        x = (momentum * m + (1 - momentum) * grad).flatten(1)
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            s = x @ x.T
            x = 3.4445 * x + (2.0315 * s @ s - 4.7750 * s) @ x
        return (1 - lr * weight_decay) * p - lr * 0.2 * max(x.shape)**0.5 * x.view_as(p)
    b1, b2 = betas
    m = state["exp_avg"] = b1 * state.get("exp_avg", zeros) + (1 - b1) * grad
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", zeros) + (1 - b2) * grad**2
    p = (1 - lr * weight_decay) * p if p.dim() >= 2 else p
    return p - lr * m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + 1e-8)


class MuonAdamW:
    """Muon for the hidden matrices; AdamW for embeddings, vectors and layers named in `plain`. The
    learning rate is set in each of param_groups before a step."""

    def __init__(self, model, plain=(), betas=(0.9, 0.99), momentum=0.95, weight_decay=0.01):
        vectors, matrices = [], []
        for name, p in model.named_parameters():
            is_plain = p.dim() < 2 or any(part in name for part in ("embed", *plain))
            (vectors if is_plain else matrices).append(p)
        self.state, common = defaultdict(dict), dict(lr=0.0, betas=betas, momentum=momentum,
                                                     weight_decay=weight_decay)
        self.param_groups = [dict(params=vectors, muon=False, **common),
                             dict(params=matrices, muon=True, **common)]

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["muon"]:
                self.adamw(params, group)
                continue
            shapes = {}
            for p in params:                              # matrices of one shape go as one batch
                shapes.setdefault((len(p), p[0].numel()), []).append(p)
            for alike in shapes.values():
                self.muon(alike, group)

    def adamw(self, params, group):
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p),
                                     exp_avg_sq=torch.zeros_like(p))
        if not params:
            return
        states, grads = [self.state[p] for p in params], [p.grad for p in params]
        first, second = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        (beta1, beta2), lr = group["betas"], group["lr"]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        torch._foreach_add_([state["step"] for state in states], 1)
        steps = [state["step"].item() for state in states]
        decayed = [p for p in params if p.dim() >= 2]
        if decayed:
            torch._foreach_mul_(decayed, 1 - lr * group["weight_decay"])
        roots = torch._foreach_sqrt(torch._foreach_div(second, [1 - beta2**n for n in steps]))
        torch._foreach_add_(roots, 1e-8)
        torch._foreach_addcdiv_(params, first, roots, [-lr / (1 - beta1**n) for n in steps])

    def muon(self, alike, group):
        """alike: parameters that are matrices of one shape."""
        for p in alike:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads, averages = [p.grad for p in alike], [self.state[p]["momentum"] for p in alike]
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, averages, group["momentum"])
        x = torch.stack([u.flatten(1) for u in updates])
        is_tall = x.shape[1] > x.shape[2]
        x = x.transpose(1, 2) if is_tall else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        if x.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported():
            x = x.bfloat16()                        # its errors only perturb the direction
        for _ in range(5):                          # Newton-Schulz towards the nearest orthogonal
            square = x @ x.transpose(1, 2)
            x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
        x = (x.transpose(1, 2) if is_tall else x).float()
        torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
        size = 0.2 * max(alike[0].flatten(1).shape) ** 0.5
        torch._foreach_add_(alike, [u.view_as(p) for u, p in zip(x, alike)],
                            alpha=-group["lr"] * size)

"""What the tests need before they are collected: the path to the scripts, the `slow` marker, few
threads, and, where there is no GPU, Triton's interpreter, repaired. Helpers of the kernel tests."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from side_by_side import pytest_runtestloop  # noqa: F401

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# asked of the driver and not of torch: the variable must stand before anything imports triton
HAS_DRIVER = Path("/proc/driver/nvidia/version").exists()
HAS_GPU = HAS_DRIVER and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
DEVICE = "cuda" if HAS_GPU else "cpu"
# A suite in a shell's background ignores Ctrl-C, and so would the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Threads that wait sleep: spinning, two processes on two cores are tens of times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # before any test's first product
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def repair_bfloat16():
    """triton 3.7.1's interpreter keeps bfloat16 as uint16: tl.dot multiplies the raw bits, and
    casts from float32 cut the low bits off where a GPU rounds to nearest even."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def to_float32(x):
        return (x.astype(np.uint32) << 16).view(np.float32)

    def convert_float(x, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):  # right as it is, but slow
            return to_float32(np.ascontiguousarray(x).view(np.uint16)).view(np.uint32)
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, rounding)
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(bits.view(np.float32)), 0x7FC0, rounded).astype(np.uint16)

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(to_float32(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: bigger grids, run by -m slow (or 'slow or not slow')")
    import torch
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(2, os.cpu_count() or 1)))
    try:
        import triton  # noqa: F401
    except ImportError:
        return  # macOS, Windows: what is Triton's skips
    if os.environ.get("TRITON_INTERPRET") == "1":
        repair_bfloat16()


def pytest_collection_modifyitems(config, items):
    if "slow" in config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """Runs a test once a backend: the torch path, and the Triton kernels (interpreted on a CPU)."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("NANOSORA_KERNELS", request.param)
    return request.param


def extents(tensors):
    """The bytes that tensors span, as sorted (first, end), those that overlap made one."""
    spans = []
    for x in tensors:
        if x.numel():
            last = sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
            spans.append([x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()])
    merged = []
    for first, end in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([first, end])
    return merged


@pytest.fixture
def fenced(monkeypatch):
    """Triton's kernels, and an error for each address read or written outside of the tensors that a
    kernel was given, in the interpreter, which reads what lies there, or dies; and for a number
    that a kernel calls a multiple of 8 and that is none, which the interpreter ignores."""
    pytest.importorskip("triton")
    monkeypatch.setenv("NANOSORA_KERNELS", "triton")
    if HAS_GPU:
        return  # compute-sanitizer's work
    import numpy as np
    import torch
    from triton.runtime import interpreter
    fence, to_host = [], interpreter.GridExecutor._init_args_hst

    def begin(self, args, options):
        args, options = to_host(self, args, options)
        given = [*args, *options.values()]
        fence[:] = [extents(x for x in given if isinstance(x, torch.Tensor))]
        return args, options

    def check(pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        at = np.broadcast_to(pointers.data, np.shape(mask.data))[np.asarray(mask.data, bool)]
        first, end = np.array(fence[0], np.uint64).reshape(-1, 2).T
        span = np.searchsorted(first, at, side="right") - 1
        assert not at.size or (span.min() >= 0 and (at + np.uint64(size) <= end[span]).all()), (
            "an address outside of every tensor")

    def promise(handle, key, values):
        if key == "tt.divisibility":
            assert not np.any(handle.data % np.min(values)), f"no multiples of {values}"

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", promise)
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", begin)
    monkeypatch.setattr(builder, "create_masked_load", lambda self, pointers, mask, *rest: (
        check(pointers, mask), load(self, pointers, mask, *rest))[1])
    monkeypatch.setattr(builder, "create_masked_store", lambda self, pointers, value, mask, *rest: (
        check(pointers, mask), store(self, pointers, value, mask, *rest))[1])


def untouched(rows, dtype, offset=0, stride=2**27, width=16):
    """[rows, 1, width] whose rows lie 2^27 numbers apart, in memory that is promised but never
    taken: the last of 17 begins where int32 ends."""
    import torch
    base = torch.empty(rows * stride, dtype=dtype)
    return base.as_strided((rows, 1, width), (stride, width, 1), offset)


def assert_near(what, got, truth, own):
    """got's error against the float64 truth is at most twice torch's own in the same dtype.

    Twice in norm, four times in the largest element. Where torch's own error is below one rounding
    of the truth to the dtype (a sixth of eps on average, or what this truth's is), that rounding takes
    its place; where all of the truth is zero (what cancels), the rounding of 16, the size of a
    product of some hundred random numbers.
    """
    import torch
    assert got.shape == truth.shape, what
    eps = torch.finfo(got.dtype).eps
    rounded = truth.to(got.dtype) if truth.any() else truth + 16 * eps
    for name, size, times in (("norm", lambda e: float(e.norm()), 2),
                              ("max", lambda e: float(e.abs().max()) if e.numel() else 0.0, 4)):
        err, own_err, floor = (size(x.detach().double() - truth) for x in (got, own, rounded))
        floor = max(floor, size(truth) * eps / 6)
        assert err <= times * max(own_err, floor), (
            f"{what}: {name} of error {err:.3g}, torch's own {own_err:.3g}, rounding {floor:.3g}")


def check_against_reference(names, inputs, run, reference):
    """Outputs and gradients of run(*inputs) against reference(*inputs, upcast) in float64.

    inputs: tensors that want gradients; run and reference return a tuple of tensors.
    """
    import torch

    def with_gradients(fn, tensors):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out = fn(*leaves)
        generator = torch.Generator().manual_seed(7)
        seeds = [torch.randn(o.shape, generator=generator).to(inputs[0].dtype) for o in out]
        seeds = [s.to(o) for s, o in zip(seeds, out)]
        return [o.detach() for o in out] + list(torch.autograd.grad(out, leaves, seeds))

    got = with_gradients(run, inputs)
    own = with_gradients(lambda *x: reference(*x, upcast=None), inputs)
    wide = [x.double() for x in inputs]
    truth = with_gradients(lambda *x: reference(*x, upcast=torch.float64), wide)
    for what, g, t, o in zip(names, got, truth, own, strict=True):
        assert_near(what, g, t, o)
    return got


SHARED = {80: 163, 90: 227, 100: 227, 120: 99}  # KiB of shared memory that a program may have
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}  # its instruction for 16 bits


def read_machine_code(cubin):
    """What counts in a kernel's machine code: bytes of stack a thread, tensor-core instructions,
    loads from global memory of 16 bytes a thread and of fewer."""
    import re
    import tempfile

    import triton
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage, code = (subprocess.run([dump, option, file.name], capture_output=True, text=True,
                                      check=True).stdout
                       for option in ("--dump-resource-usage", "-sass"))
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.E\S*", code)
    wide = sum(".128" in load for load in loads)
    return dict(stack=int(re.search(r"STACK:(\d+)", usage)[1]), wide=wide, narrow=len(loads) - wide,
                mma=sorted(set(re.findall(r"\b(HMMA|HGMMA|UTCHMMA)\b", code))))


def compile_kernels(module, launch, arch):
    """Compiles what launch() would launch of module's kernels for a GPU that need not be here, and
    prints what read_machine_code says of each as JSON. Runs in a process without the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    compiler = make_backend(target)
    result = {}

    def compile_one(kernel, args, options):
        bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
        bound, specialised, more = bind(*args, **options)
        packed, signature, constants, attrs = kernel._pack_args(
            compiler, options, bound, specialised, more)
        source = ASTSource(kernel, signature, constants, attrs)
        made = triton.compile(source, target=target, options=packed.__dict__)
        result[f"{kernel.fn.__name__} {args[0].dtype} {options}"] = dict(
            read_machine_code(made.asm["cubin"]), shared=made.metadata.shared / 1024)

    class Catch:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: compile_one(self.kernel, args, options)

    for name in [name for name in dir(module) if name.endswith("_kernel")]:
        setattr(module, name, Catch(getattr(module, name)))
    launch()
    print(json.dumps(result))


def sums_as_they_are(data):
    """Writes the sums of a data set's shards, as they are now, into its manifest: damage that was
    there from the first."""
    about = json.loads((data / "manifest.json").read_text())
    for files in about["shards"].values():
        files.update({name: hashlib.sha256((data / name).read_bytes()).hexdigest()
                      for name in files})
    (data / "manifest.json").write_text(json.dumps(about))


def compiled(test_module, arch, launch="launch_all", stack=0):
    """{kernel: what read_machine_code says} of a test file's launch_all(), for sm_ARCH. Each fits
    the GPU's shared memory and has at most `stack` bytes a thread of it: there the spills are."""
    pytest.importorskip("triton")
    code = (f"import conftest, {test_module} as t; "
            f"conftest.compile_kernels(t.MODULE, t.{launch}, {arch})")
    env = dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    over = {name: made for name, made in result.items()
            if made["stack"] > stack or made["shared"] > SHARED[arch]}
    assert result and not over, over
    return result

"""PyTorch scaled_dot_product_attention on CUDA, each backend by itself, as CSV on stdout. Started by ./torch_cuda."""

import argparse
import csv
import statistics
import sys
import time
import warnings

from torch_cpu import COLUMNS, attend, gradients_error, gradients_of, max_error, parse_shape

BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}


def arguments():
    p = argparse.ArgumentParser(prog="torch_cuda", description=__doc__)
    p.add_argument("--shapes", default="1x16x16384x128", help="comma list of BxHq[/Hkv]xSq[/Sk]xD[/Dv]")
    p.add_argument("--options", default="plain,causal", help="comma list of plain, causal")
    p.add_argument("--backward", action="store_true", help="the gradients of q, k and v alone")
    p.add_argument("--dtype", default="f16", choices=["f32", "f16", "bf16"])
    p.add_argument("--backends", default=",".join(BACKENDS), help="comma list of " + ", ".join(BACKENDS))
    p.add_argument("--repeat", type=int, default=10, help="timed calls per case; the median counts")
    p.add_argument("--seconds", type=float, default=6, help="no further call of a case begins after this long")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try this program without a GPU")
    a = p.parse_args()
    a.shapes = [(s, parse_shape(s)) for s in a.shapes.split(",")]
    a.options, a.backends = a.options.split(","), a.backends.split(",")
    for given, known in [(a.options, ["plain", "causal"]), (a.backends, BACKENDS)]:
        if bad := [x for x in given if x not in known]:
            p.error(f"{bad[0]!r} is none of {', '.join(known)}")
    if a.repeat < 1:
        p.error("--repeat starts at 1")
    return a


def measure(a, torch, q, k, v, dout, causal, backend):
    """Median milliseconds of a call, and its output: o, or with --backward the gradients of q, k and v."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    synchronize = torch.cuda.synchronize if a.device == "cuda" else lambda: None
    times = []
    with torch.inference_mode(not a.backward), sdpa_kernel([getattr(SDPBackend, BACKENDS[backend])]):
        call = lambda: attend(torch, q, k, v, causal)
        if a.backward:
            call = gradients_of(torch, q, k, v, dout, causal)
        o = call()
        synchronize()
        started = time.perf_counter()
        # One more unmeasured call, where there is time: the first chooses kernels and grows the clock.
        for n in range(a.repeat + 1):
            start = time.perf_counter()
            call()
            synchronize()
            end = time.perf_counter()
            if n or end - started > a.seconds:
                times.append(end - start)
            if end - started > a.seconds:
                break
    return statistics.median(times) * 1e3, o


def main():
    a = arguments()
    warnings.filterwarnings("ignore")
    import torch
    if a.device == "cuda" and not torch.cuda.is_available():
        print("torch_cuda: this torch has no CUDA", file=sys.stderr)
        sys.exit(3)
    torch.manual_seed(0)
    # f32 in f32: tensor cores would round q, k and v to 10 bits of mantissa.
    torch.backends.cuda.matmul.allow_tf32 = False
    adapter = torch.cuda.get_device_name() if a.device == "cuda" else "cpu"
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[a.dtype]
    version = f"{torch.__version__.split('+')[0]} CUDA {torch.version.cuda}"
    out = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    out.writeheader()
    for text, (b, hq, hkv, sq, sk, d, dv) in a.shapes:
        q = torch.randn(b, hq, sq, d, device=a.device).to(dtype)
        k = torch.randn(b, hkv, sk, d, device=a.device).to(dtype)
        v = torch.randn(b, hkv, sk, dv, device=a.device).to(dtype)
        dout = torch.randn(b, hq, sq, dv, device=a.device).to(dtype) if a.backward else None
        host = [x.cpu() for x in (q, k, v)]
        for option in a.options:
            causal = option == "causal"
            if causal and sq != sk:
                print(f"torch_cuda: {text} causal skipped: peers align Sq != Sk differently", file=sys.stderr)
                continue
            for backend in a.backends:
                try:
                    ms, got = measure(a, torch, q, k, v, dout, causal, backend)
                except RuntimeError as e:  # out of memory, too
                    why = str(e).strip().splitlines()[0]
                    print(f"torch_cuda: {text} {a.dtype} {option} {backend}: {why}", file=sys.stderr)
                    continue
                flop = 2 * b * hq * sq * sk * (d + dv) / (2 if causal else 1) * (2.5 if a.backward else 1)
                if a.backward:
                    error = gradients_error(torch, q, k, v, dout, causal, got)
                else:
                    error = max_error(torch, *host, got.cpu(), causal)
                out.writerow({
                    "peer": f"pytorch-{backend}", "version": version, "adapter": adapter, "dtype": a.dtype,
                    "shape": text, "options": option, "ms": f"{ms:.4f}", "gflops": f"{flop / ms / 1e6:.2f}",
                    "max_error": f"{error:.3e}"})
                sys.stdout.flush()
                del got


if __name__ == "__main__":
    main()

"""PyTorch scaled_dot_product_attention on the CPU, as CSV on stdout. Started by ./torch_cpu."""

import argparse
import csv
import math
import os
import platform
import statistics
import sys
import time

COLUMNS = "peer,version,adapter,dtype,shape,options,ms,gflops,max_error".split(",")


def arguments():
    p = argparse.ArgumentParser(prog="torch_cpu", description=__doc__)
    p.add_argument("--shapes", default="1x8x512x64,1x8x1024x64,1x8x2048x64",
                   help="comma list of BxHq[/Hkv]xSq[/Sk]xD[/Dv]")
    p.add_argument("--options", default="plain,causal", help="comma list of plain, causal")
    p.add_argument("--dtype", default="f32", choices=["f32", "f16"])
    p.add_argument("--repeat", type=int, default=10, help="timed calls per case; the median counts")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                   else os.cpu_count())
    a = p.parse_args()
    a.shapes = [(s, parse_shape(s)) for s in a.shapes.split(",")]
    a.options = a.options.split(",")
    if bad := [o for o in a.options if o not in ("plain", "causal")]:
        p.error(f"unknown option {bad[0]!r}")
    if a.repeat < 1 or a.threads < 1:
        p.error("--repeat and --threads start at 1")
    return a


def parse_shape(text):
    """`BxHq[/Hkv]xSq[/Sk]xD[/Dv]` as (b, hq, hkv, sq, sk, d, dv)."""
    try:
        b, h, s, d = text.split("x")
        (hq, hkv), (sq, sk), (dq, dv) = (
            (lambda n: (n[0], n[-1]))([int(n) for n in part.split("/", 1)]) for part in (h, s, d))
        shape = (int(b), hq, hkv, sq, sk, dq, dv)
        if min(shape) < 1 or hq % hkv:
            raise ValueError
        return shape
    except ValueError:
        sys.exit(f"torch_cpu: bad shape {text!r}, expected BxHq[/Hkv]xSq[/Sk]xD[/Dv]")


def cpu_name():
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def spread(n, most):
    """At most `most` of 0..n, evenly spread, the first and the last among them."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def max_error(torch, q, k, v, o, causal):
    """max|o - o64| over up to 32 (batch, head) pairs and 64 rows of each, o64 computed in float64."""
    b, hq, sq, d = q.shape
    group = hq // k.shape[1]
    rows = torch.tensor(spread(sq, 64))
    worst = 0.0
    for pair in spread(b * hq, 32):
        i, h = divmod(pair, hq)
        s = q[i, h, rows].double() @ k[i, h // group].double().T / math.sqrt(d)
        if causal:
            s.masked_fill_(torch.arange(k.shape[2])[None, :] > rows[:, None], -math.inf)
        o64 = torch.softmax(s, -1) @ v[i, h // group].double()
        worst = max(worst, (o[i, h, rows].double() - o64).abs().max().item())
    return worst


def main():
    a = arguments()
    # Before torch is loaded: its thread pools read these once.
    os.environ.setdefault("OMP_NUM_THREADS", str(a.threads))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import warnings
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    dtype = {"f32": torch.float32, "f16": torch.float16}[a.dtype]
    out = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    out.writeheader()
    for text, (b, hq, hkv, sq, sk, d, dv) in a.shapes:
        q = torch.randn(b, hq, sq, d).to(dtype)
        k = torch.randn(b, hkv, sk, d).to(dtype)
        v = torch.randn(b, hkv, sk, dv).to(dtype)
        for option in a.options:
            causal = option == "causal"
            if causal and sq != sk:
                print(f"torch_cpu: {text} causal skipped: peers align Sq != Sk differently", file=sys.stderr)
                continue
            times = []
            with torch.inference_mode():
                call = lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=hq != hkv)
                o = call()
                for _ in range(2):
                    call()
                for _ in range(a.repeat):
                    start = time.perf_counter()
                    call()
                    times.append(time.perf_counter() - start)
                error = max_error(torch, q, k, v, o, causal)
            seconds = statistics.median(times)
            flop = 2 * b * hq * sq * sk * (d + dv) / (2 if causal else 1)
            out.writerow({
                "peer": "torch_cpu", "version": torch.__version__.split("+")[0],
                "adapter": f"{cpu_name()} x{a.threads}", "dtype": a.dtype, "shape": text, "options": option,
                "ms": f"{seconds * 1e3:.4f}", "gflops": f"{flop / seconds / 1e9:.2f}", "max_error": f"{error:.3e}"})
            sys.stdout.flush()


if __name__ == "__main__":
    main()

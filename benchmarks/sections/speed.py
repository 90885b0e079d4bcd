"""Time and memory."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.text import ran, table


def total_time(result: dict[str, Any]) -> str:
    rows = []
    for name, row in result["rows"].items():
        if "failed" in row:
            if row["failed"] != "not run":
                rows.append([name, "failed", "", row["failed"]])
            continue
        kl = f"{row['quality']['kl']:.3f}" if "quality" in row else ""
        rows.append([name, f"{row['median_s']:.0f} s", f"{row['peak_bytes'] / 1e9:.1f} GB", kl])
    settings = result["settings"]
    rounds = max(len(row["rounds"]) for row in result["rows"].values())
    return (
        f"The whole of quantizing SmolLM2-135M, W{settings['bits']} g{settings['group']}, "
        f"{settings['windows']} windows, float32, two threads, each in a process of its own, "
        f"median of {rounds} in one run; loading excluded, compiling included. *forwards*: two "
        "plain forwards over the same tokens; *reference*: the published loop, block by block, in "
        f"PyTorch; KL on {settings['evaluation_windows']} held-out windows.\n\n"
        + table(["", "time", "peak memory", "KL"], rows)
        + f"\n{ran(result)}.\n"
    )


def depth(result: dict[str, Any]) -> str:
    rows = [
        [
            str(row["layers"]),
            f"{row['weights_bytes'] / 1e9:.2f} GB",
            f"{max(row['peak_bytes'].values()) / 1e9:.2f} GB",
        ]
        for row in result["rows"]
    ]
    limit = result["limit"]
    return (
        "Decoders of random float32 weights, read lazily and quantized to 4 bits by "
        f"GPTQ with a work directory, under a limit of {limit['bytes'] / 1e9:.1f} GB of address "
        "space: peak resident size of the process against depth.\n\n"
        + table(["layers", "weights", "peak memory"], rows)
    )


def flat(result: dict[str, Any]) -> str:
    """How little memory depends on depth, of `depth.json`."""
    ends = result["rows"][0], result["rows"][-1]
    small, large = (
        f"{row['weights_bytes'] / 1e9:.1f} GB in {max(row['peak_bytes'].values()) / 1e9:.2f} GB"
        for row in ends
    )
    return (
        f"A model of {large} of memory, one of {small} "
        "([results](../results/speed.md#memory-against-depth)).\n"
    )


def solver(result: dict[str, Any]) -> str:
    names = list(result["groups_of_64"][0]["methods"])
    rows = []
    for row in result["groups_of_64"]:
        seconds = {name: f"{row['methods'][name]['median_s']:.3f}" for name in names}
        rows.append(
            ["×".join(map(str, row["shape"])), *seconds.values(), f"{row['compile_s']:.1f}"]
        )
    unrolled = result["whole_rows"]["methods"]
    return (
        "The solver, given the second moment: 4 bits, groups of 64, seconds (median, "
        "alternating in one run, two threads), equal losses; our compile time beside. qwix, which "
        f"unrolls every column, took "
        f"{unrolled['qwix']['median_s']:.2f} s at 576×576 where jquant took "
        f"{unrolled['jquant']['median_s']:.3f} s.\n\n"
        + table(["out × in", *names, "compile"], rows)
        + f"\n{ran(result)}.\n"
    )


def capture(result: dict[str, Any]) -> str:
    rows = [
        [
            dtype,
            f"{row['seconds']['forward']:.2f} s",
            f"{row['seconds']['capture']:.2f} s",
            f"{row['seconds']['products']:.2f} s",
            f"{row['beyond_products_vs_forward']:.2f}",
        ]
        for dtype, row in result["rows"].items()
    ]
    return "All 210 second moments of SmolLM2 on 2 048 tokens, beside a plain forward.\n\n" + table(
        ["compute", "forward", "capture", "of it Gram products", "the rest / forward"], rows
    )


def encode(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        best = min(row["rivals"].items(), key=lambda item: item[1]["seconds"], default=None)
        beside = ["–", ""]
        if best is not None:
            name, found = best
            beside = [f"{name} {1000 * found['seconds']:.0f}", f"{found['times_jquant']:.2f}"]
        cells = [f"{1000 * row[key]:.0f}" for key in ("seconds", "in_bytes_s")]
        rows.append([row["grid"], *cells, *beside])
    casts = "; ".join(
        f"to {dtype} {1000 * row['hash']:.0f} ms (cast {1000 * row['cast']:.0f}, Threefry "
        f"{1000 * row['threefry']:.0f})"
        for dtype, row in result["casts"].items()
    )
    return (
        "Fitting and nearest codes of a 4096×4096 float32 weight, milliseconds, "
        "median of alternating runs, two threads; the fastest other code that runs here and its "
        "time over ours. Packed 4-bit codes are slow for XLA's CPU compiler: *in bytes* leaves "
        "them unpacked. "
        f"Stochastic rounding of the same weight: {casts}.\n\n"
        + table(["grid", "jquant", "in bytes", "best other", "other / jquant"], rows)
        + f"\n{ran(result)}.\n"
    )


def compiled(result: dict[str, Any]) -> str:
    """What compilers make of products with quantized weights, of `compiled.json`."""
    rows = []
    for device, products in result["rows"].items():
        full = {p["tokens"]: p for p in products if p["way"] == "full"}
        ways = {(p["weight"], p["group"], p["tokens"], p["way"]): p for p in products}
        for (weight, group, tokens, way), kernel in ways.items():
            if way == "kernel" and group == 128 and tokens in (1, 16, 256):
                three = full[tokens], ways[weight, group, tokens, "decoded"], kernel
                rows.append([device, weight, str(tokens), *map(_size, three), *map(_time, three)])
    heads = ["full", "decoded", "kernel"]
    return (
        f"One product of bfloat16 inputs and a weight of {result['width']}², groups of 128, "
        "compiled for devices that were not there: memory beside operands and result, and of TPUs "
        "the compiler's own estimate of time, by which it chooses among programs; nothing ran. "
        "*decoded*: the weight is decoded, then multiplied; *kernel*: as `apply` has it, which "
        "multiplies codes and scales the results of groups where that takes less.\n\n"
        + table(
            ["device", "weight", "tokens", *heads, *(f"{head}, estimate" for head in heads)], rows
        )
        + f"\nJAX {result['machine']['versions']['jax']}, {result['machine']['date']}.\n"
    )


def _size(product: dict[str, Any]) -> str:
    return f"{product['temporary_bytes'] / 1e6:.1f} MB"


def _time(product: dict[str, Any]) -> str:
    seconds = product["estimated_seconds"]
    return f"{seconds * 1e6:.0f} µs" if seconds else "–"

"""Writes the README's figures from `results/*.json`, so that no number is typed by hand.

python -m benchmarks.readme           # rewrite README.md
python -m benchmarks.readme --check   # exit 1 if it is not up to date
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arithmetic import tables
from benchmarks.harness import RESULTS
from benchmarks.others import OTHERS

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- results -->\n", "<!-- end of results -->"
# What everybody wants to know stands open; the other sections are folded.
OPEN = {"quality", "stages", "learned_smollm2", "bits", "total_time", "depth"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def ran(result: dict[str, Any]) -> str:
    machine = result["machine"]
    many = "core" if machine["cores"] == 1 else "cores"
    return (
        f"{machine['cores']} {many} of {machine['processor']}, Python {machine['python']}, "
        f"JAX {machine['versions']['jax']}, {machine['date']}"
    )


def quality(result: dict[str, Any]) -> str:
    rows = []
    for name, row in result["rows"].items():
        others = {k: v for k, v in row["elsewhere"].items() if k not in ("nearest", "HQQ")}
        rows.append(
            [
                name,
                f"{row['Nearest']['bits_per_weight']:.2f}",
                *(f"{row[label]['kl']:.4f}" for label in ("Nearest", "GPTQ")),
                f"{row['GPTQ, searched range']['kl']:.4f}",
                str(row["elsewhere"]["nearest"]),
                str(row["elsewhere"]["HQQ"]),
                "; ".join(f"{k} {v}" for k, v in others.items()),
            ]
        )
    full = next(iter(result["rows"].values()))["GPTQ"]["perplexity_full"]
    return (
        "**Quality.** SmolLM2-135M (perplexity "
        f"{full:.2f}), 210 linears, asymmetric grid, {result['windows']} calibration windows of "
        "512 tokens, one pass: mean KL to the full model in nats per token on 16 held-out windows. "
        "*Searched range*: GPTQ's own option, off in the other rows; the GPTQ presets use it. "
        "*Elsewhere*: other tools on the same tokens, run by themselves, min-max ranges; those "
        "marked block by block calibrate each block on already quantized ones.\n\n"
        + table(
            [
                "",
                "bits",
                "nearest",
                "GPTQ",
                "GPTQ, searched range",
                "nearest elsewhere",
                "HQQ elsewhere",
                "GPTQ elsewhere",
            ],
            rows,
        )
        + f"\n{ran(result)}.\n"
    )


def minilm(result: dict[str, Any]) -> str:
    rows = []
    for name, row in result["rows"].items():
        cosines = {key: row[key]["one_minus_cosine"]["mean"] for key in ("Nearest", "GPTQ")}
        rows.append([name, f"{cosines['Nearest']:.4f}", f"**{cosines['GPTQ']:.4f}**"])
    return (
        "**Natural weights.** MiniLM-L6 (float32) as a plain JAX function: mean 1 − cosine of "
        "sentence vectors to the full model's, on held-out sentences.\n\n"
        + table(["", "nearest", "GPTQ"], rows)
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
        "**GPTQ solver**, given the second moment: 4 bits, groups of 64, seconds (median, "
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
    return (
        "**Capture.** All 210 second moments of SmolLM2 on 2 048 tokens, beside a plain forward."
        "\n\n"
        + table(
            ["compute", "forward", "capture", "of it Gram products", "the rest / forward"], rows
        )
    )


def stages(result: dict[str, Any]) -> str:
    methods = ["all", "block", "weight", "weight + GPTAQ", "weight + QEP"]
    methods += ["weight, searched range", "weight + QEP, searched range"]
    head = ["", *methods, "best elsewhere"]
    one_pass = json.loads((RESULTS / "quality.json").read_text())["rows"]
    rows = []
    for name, row in result["rows"].items():
        found = {"all": one_pass[name]["GPTQ"], **row}
        cells = [f"{found[m]['kl']:.4f}" if m in found else "–" for m in methods]
        rows.append([name, *cells, str(min(OTHERS[name].values()))])
    return (
        "**Stages.** The same model, tokens and grids, every weight calibrated on what the "
        "quantized weights before it produce: KL by granularity (*all*: one pass, as above), with "
        "corrections for inputs that have drifted, and with searched ranges, which the presets "
        "use. The default is *weight*.\n\n" + table(head, rows) + f"\n{ran(result)}.\n"
    )


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
        f"**Time.** The whole of quantizing it, W{settings['bits']} g{settings['group']}, "
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
        "**Memory.** Decoders of random float32 weights, read lazily and quantized to 4 bits by "
        f"GPTQ with a work directory, under a limit of {limit['bytes'] / 1e9:.1f} GB of address "
        "space: peak resident size of the process against depth.\n\n"
        + table(["layers", "weights", "peak memory"], rows)
    )


def grids(result: dict[str, Any]) -> str:
    methods = ["nearest", "GPTQ"]
    parts = []
    for bits, rows in result["rows"].items():
        lowest = {
            method: min(row[method]["kl"] for row in rows.values() if method in row)
            for method in methods
        }
        lines = []
        for name, row in rows.items():
            cells = []
            for method in methods:
                kl = row[method]["kl"] if method in row else None
                said = "–" if kl is None else f"{kl:.4f}"
                cells.append(f"**{said}**" if kl == lowest[method] else said)
            lines.append([name, f"{row['nearest']['bits_per_weight']:.2f}", *cells])
        parts.append(table([bits, "bits stored", *methods], lines))
        least = min(row["nearest"]["bits_per_weight"] for row in rows.values())
        slim = {k: v for k, v in rows.items() if v["nearest"]["bits_per_weight"] < least + 0.25}
        for method in methods:
            ranked = sorted(
                (row[method]["kl"], name) for name, row in rows.items() if method in row
            )
            best = min((row[method]["kl"], name) for name, row in slim.items() if method in row)
            said = f"At {bits}, {method}: *{ranked[0][1]}* is best"
            if best != ranked[0]:
                said += f", and *{best[1]}* of those within a quarter of a bit of the smallest"
            parts.append(said + ".\n")
    return (
        "**Grids.** The same model and one-pass evidence, 8 held-out windows: KL at about equal "
        "bits per weight, everything stored counted. Scales are float16 and groups of 64 where the "
        "format does not fix them (*MX* 32, *NV* 16); *k-means* has a table per row. At 3 bits "
        "*Float*, *MX* and *NV* hold E2M0. Lowest of a column in bold. The downloaded weights lie "
        "on a 4-bit grid of 32 with zeros between codes, which favours *HQQ*.\n\n"
        + "\n".join(parts)
        + f"\n{ran(result)}.\n"
    )


def learned(result: dict[str, Any]) -> str:
    rows, settings = result["rows"], result["settings"]

    def cell(seeds: dict[str, Any]) -> str:
        if not seeds:
            return "–"
        found = [run["kl"]["evaluation"] for run in seeds.values()]
        tuned = [run["scales"]["kl"]["evaluation"] for run in seeds.values()]
        spread = f" ± {statistics.stdev(found):.4f}" if len(set(found)) > 1 else ""
        return f"{statistics.mean(found):.4f}{spread}, {statistics.mean(tuned):.4f}"

    most = sorted(rows.values(), key=len, reverse=True)  # the fullest column says the order
    methods = list(dict.fromkeys(method for found in most for method in found))
    lines = [[m, *(cell(rows[name].get(m, {})) for name in rows)] for m in methods]
    return (
        "**Learned roundings.** A byte-level network of a million weights, trained; one "
        f"asymmetric grid for all but the power grids; {settings['windows']} windows of 256 bytes, "
        f"{settings['steps']} steps of {settings['rows']} windows where there are steps. KL on "
        "held-out text in nats per byte: mean ± deviation over up to 3 seeds (of the data, and of "
        f"random starts), then the mean after {settings['scales']} steps of `tune_scales`. "
        "SignRound learns ranges too; *block* learns blocks on their outputs, *KL* and DiscQuant "
        "all weights on the network's.\n\n"
        + table(["rounding", *rows], lines)
        + f"\n{ran(result)}{result.get('note', '')}.\n"
    )


def learned_smollm2(result: dict[str, Any]) -> str:
    settings, lines = result["settings"], []
    for name, row in result["rows"].items():
        cells = [f"{row[key]:.4f}" for key in ("calibration_kl", "kl")]
        lines.append([name, *cells, f"{row['seconds'] / 60:.1f}"])
    said = ""
    if step := result.get("step"):
        parts = sum(step["parts_bytes"].values())
        said = (
            f" A step of DiscQuant on {step['tokens']} tokens takes {step['seconds']:.1f} s, its "
            f"products alone {step['ideal_seconds']:.1f} s; the process's memory peaks at "
            f"{step['peak_bytes'] / 1e9:.1f} GB, of which parameters, positions, moments, gradient "
            f"and logits are {parts / 1e9:.1f} GB."
        )
    return (
        "**Learned on SmolLM2.** 3 bits in groups of 64, one static grid, 64 windows of 512 "
        f"tokens; {settings['steps']} steps of {settings['rows']} window(s) on the whole network's "
        f"KL, or {settings['block_steps']} for every block: KL on text it learned from, on 16 "
        "held-out windows, and minutes. SignRound learns ranges too where they are not kept."
        f"{said}\n\n"
        + table(["rounding", "calibration text", "held-out text", "minutes"], lines)
        + f"\n{ran(result)}{result.get('note', '')}.\n"
    )


def lorc(result: dict[str, Any]) -> str:
    rows = result["rows"]
    methods = list(dict.fromkeys(method for found in rows.values() for method in found))
    lines = []
    for method in methods:
        cells = []
        for found in rows.values():
            alike = [
                row["kl"] for m, row in found.items() if m.split(",")[0] == method.split(",")[0]
            ]
            row = found[method]
            kl = f"**{row['kl']:.3f}**" if row["kl"] == min(alike) else f"{row['kl']:.3f}"
            cells.append(f"{kl} ({row['bits_per_weight']:.2f})")
        lines.append([method, *cells])
    return (
        "**Low-rank terms.** SmolLM2-135M, rank 8, 8-bit factors; one pass, 8 held-out windows: "
        "KL (stored bits per weight, factors counted), lowest of each rounding in bold. *LoRC* "
        "knows no data, *QERA* is the term in the metric of the inputs; *smaller groups* spend the "
        "factors' bytes on more scales instead: where a weight has one scale per row that is the "
        "better use of them beside GPTQ, in groups of 64 the term is. At 2 bits with one scale per "
        "row and range by min-max nothing is left to save.\n\n"
        + table(["", *rows], lines)
        + f"\n{ran(result)}.\n"
    )


def activations(result: dict[str, Any]) -> str:
    lines = [
        [name, f"{row['bits_per_weight']:.2f}", f"{row['kl']:.4f}", f"{row['agreement']:.3f}"]
        for name, row in result["rows"].items()
    ]
    said = [
        "**Quantized inputs.** SmolLM2-135M, 8 held-out windows; 8-bit weights with one scale per "
        "output, 4-bit ones in groups of 64 or per row, all linears of the blocks. *LKD*: the "
        "weights of each block learned on its outputs, from the full model's inputs.\n\n",
        table(["weights and inputs", "bits per weight", "KL", "same first choice"], lines),
    ]
    if speed := result.get("speed"):
        rows = [
            [name, f"{row['seconds']:.2f}", f"{row['median_times_faster']:.2f}"]
            for name, row in speed["rows"].items()
        ]
        count, length = speed["tokens"]
        said += [
            f"\nA prefill of {count} × {length} tokens, programs taking turns "
            f"{speed['rounds']} times: the least of the times, and the median of how many times "
            "faster than float32 in the same turn.\n\n",
            table(["", "seconds", "times faster"], rows),
        ]
    return "".join(said) + f"\n{ran(result)}.\n"


def bits(result: dict[str, Any]) -> str:
    lines = []
    widths = sorted({m for found in result["rows"].values() for m in found}, reverse=True)
    for method, found in result["rows"].items():
        known = {row for some in found.values() for row in some}
        lowest = {m: min(row["kl"] for row in found[m].values()) for m in found}
        for row in filter(known.__contains__, result["names"]):
            cells = []
            for mean in widths:
                kl = found.get(mean, {}).get(row, {}).get("kl")
                best = kl is not None and kl == lowest[mean]
                cells.append("–" if kl is None else f"**{kl:.4f}**" if best else f"{kl:.4f}")
            score = result["scores"].get(row)
            lines.append([method, row, *cells, f"{score['seconds']:.0f}" if score else ""])
    return (
        "**Who gets the bits.** SmolLM2-135M, groups of 64, 2 to 8 bits for each weight; KL on 8 "
        "held-out windows at the bytes of a mean width. *uniform*: one width, or two by depth; "
        "*ends*: the wider one for the first and last layers; the others by a score and exact "
        "dynamic programming, or by CPTQuant's three clusters. CPTQuant finds the first and last "
        "30 % of the layers the sensitive ones; here it is the kind of weight (v, then k) and the "
        "last block, and scores that know one number per block gain little or nothing.\n\n"
        "![bits by depth and by kind of weight](docs/images/bits-by-depth.svg)\n\n"
        + table(["rounding", "by", *(f"{m} bits" for m in widths), "seconds of the score"], lines)
        + f"\n{ran(result)}{result.get('note', '')}.\n"
    )


def adadim(result: dict[str, Any]) -> str:
    axes = ["in", "out", "AdaDim", "AdaDim, own product"]
    roundings = ["nearest", "GPTQ", "GPTQ dynamic"]
    lines = []
    for setting, rows in result["rows"].items():
        for rounding in roundings:
            found = [rows.get(f"{rounding} {axis}", {}).get("kl") for axis in axes]
            known = [kl for kl in found if kl is not None]
            if not known:
                continue
            cells = ["–" if kl is None else f"{kl:.4f}" for kl in found]
            cells = [
                f"**{c}**" if kl == min(known) else c for c, kl in zip(cells, found, strict=True)
            ]
            lines.append([setting, rounding, *cells])
    chosen = []
    for setting, levels in result["choices"].items():
        kinds = levels["residual"]["kinds"]
        said = ", ".join(f"{kind} {row['out']}" for kind, row in kinds.items() if row["out"])
        chosen.append(f"at {setting}, of 30 each, {said}")
    return (
        "**Axes.** Groups of 128 along inputs, outputs, or what AdaDim chooses by the output of "
        "the attention or MLP (or by each weight's own product); grid A2, one pass, 8 held-out "
        "windows: "
        "KL. *Dynamic*: GPTQ fits groups along outputs to columns as it comes to them. Along "
        f"outputs go {'; '.join(chosen)}.\n\n"
        + table(["", "rounding", *axes], lines)
        + f"\n{ran(result)}.\n"
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
        "**Encoding.** Fitting and nearest codes of a 4096×4096 float32 weight, milliseconds, "
        "median of alternating runs, two threads; the fastest other code that runs here and its "
        "time over ours. Packed 4-bit codes are slow for XLA's CPU compiler: *in bytes* leaves "
        "them unpacked. "
        f"Stochastic rounding of the same weight: {casts}.\n\n"
        + table(["grid", "jquant", "in bytes", "best other", "other / jquant"], rows)
        + f"\n{ran(result)}.\n"
    )


SHOWN = {
    "lorenz96": tables.lorenz96,
    "shallow_water": tables.shallow_water,
    "speedy": tables.atmosphere,
}


def arithmetic(result: dict[str, Any]) -> str:
    parts = result["parts"]
    said = [
        "**Arithmetic.** The study of Paxton et al. (2022) with `jq.emulate`: bits of significand, "
        "every result rounded to nearest or at random (*stochastic*). Ranges are over keys and "
        "starts; the *band* is the distance between double-precision runs from other starts. "
        "Lorenz 96 is compared with several such runs; *double* is what no rounding gives.\n"
    ]
    if "heat" in parts:
        rows = []
        for bits, row in parts["heat"]["rmse"].items():
            last = row[f"{parts['heat']['years']} years"]
            low, high = min(last["stochastic"]), max(last["stochastic"])
            rows.append([bits, f"{last['nearest']:.2f} K", f"{low:.2g} to {high:.2g} K"])
        head = [f"heat column, {parts['heat']['years']} years: RMSE", "nearest", "stochastic"]
        said.append(table(head, rows))
    if "lorenz" in parts:
        rows, band = [], parts["lorenz"]["band"]["z"]
        for bits, row in parts["lorenz"]["rows"].items():
            cells = []
            for name in ("nearest", "stochastic"):
                unique, far = row[name]["unique"], row[name]["w1"]["z"]
                cells += [f"{middle(unique):,.0f}", f"{min(far):.3f} to {max(far):.3f}"]
            rows.append([bits, *cells])
        head = [
            f"Lorenz 63: of {parts['lorenz']['states']:,} states; W1 of z, "
            f"band {band[0]:.3f} to {band[2]:.3f}",
            "unique, nearest",
            "W1",
            "unique, stochastic",
            "W1",
        ]
        said.append(table(head, rows))
    for name, shown in SHOWN.items():
        if name in parts:
            said.append(table(*shown(parts[name])))
    if "speedy" in parts:
        said.append(tables.about_atmosphere(parts["speedy"]))
    cost = {
        name.removeprefix("overhead_").replace("_", " "): part
        for name, part in parts.items()
        if name.startswith("overhead")
    }
    if cost:
        names = list(next(iter(cost.values()))["rows"])
        rows = []
        for name in names:
            cells = []
            for row in cost.values():
                found = row["rows"].get(name)
                cells.append(
                    f"{found['us_per_step']:.0f} µs, {found['times_plain']:.1f} ×" if found else "–"
                )
            rows.append([name, *cells])
        said.append(table(["time per step and times plain, float32, 10 bits", *cost], rows))
    return "\n".join(said) + f"\n{ran(result)}; processor time, with other jobs beside.\n"


def middle(numbers: Sequence[float]) -> float:
    return sorted(numbers)[len(numbers) // 2]


SECTIONS = {
    "quality": quality,
    "stages": stages,
    "grids": grids,
    "learned": learned,
    "learned_smollm2": learned_smollm2,
    "lorc": lorc,
    "activations": activations,
    "bits": bits,
    "adadim": adadim,
    "encode": encode,
    "total_time": total_time,
    "depth": depth,
    "minilm": minilm,
    "gptq_solver": solver,
    "capture": capture,
    "arithmetic": arithmetic,
}


def folded(text: str) -> str:
    """A section that opens when its title is clicked; titles are what a section begins with."""
    title = text.split("**")[1].rstrip(".")
    return f"<details><summary>{title}</summary>\n\n{text}\n</details>\n"


def render() -> str:
    """The README with its figures from `results/`."""
    found = {}
    for name, section in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            found[name] = section(json.loads(path.read_text()))
    parts = [text for name, text in found.items() if name in OPEN]
    parts += [folded(text) for name, text in found.items() if name not in OPEN]
    text = README.read_text()
    head, tail = text.split(START)[0], text.split(END)[1]
    return head + START + "\n" + "\n".join(parts) + "\n" + END + tail


def main() -> int:
    text = render()
    if "--check" in sys.argv:
        return int(text != README.read_text())
    README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""What the emulator counts of the kernels at real shapes (kava_bench of the preset emulated), as the last part of docs/kernels_table.md.

Usage: tools/kernel_counts.py [--check] [--shape SHAPE...] [--filter REGEX]
Writes that part; --check compares with it instead, to within 0.02, and ends with 1 on a difference or a count over its budget.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOC = ROOT / "docs/kernels_table.md"
TITLE = "# Kernels as counted"
SECTORS, ELEMENTWISE_BYTES, WAVEFRONTS, PRODUCTS, ATTENTION = 1.1, 1.05, 1.0, 1.05, 1.5
HEAD = f"""{TITLE}

Written by tools/kernel_counts.py: what the emulator counts at the shapes of `kava_bench --device cuda`, over the fewest (docs/kernels.md
section 4). Nothing here was timed. A sample of blocks stands for a launch. Budgets, held for launches of more than one block: sectors {SECTORS},
bytes of elementwise kernels {ELEMENTWISE_BYTES}, wavefronts {WAVEFRONTS}, mma of products {PRODUCTS} and of attention {ATTENTION}.

| shape | op | kernel | blocks | sectors | bytes | wavefronts | mma |
|---|---|---|---|---|---|---|---|
"""
ALL = "attention|rope|norm|swiglu|gelu|linear|rkv|distill|sum_squares|adamw"


def over(counted, fewest):
    return counted / fewest if fewest else None


def rows_of(shape, pattern):
    """(key, figures) of every launch of a shape, and of every op with products; figures may be None."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        bench = ROOT / "build/emulated/bin/kava_bench"
        subprocess.run([bench, "--device", "cuda", "--shape", shape, "--filter", pattern, "--json", out.name], check=True,
                       stdout=subprocess.DEVNULL)
        counts = [c for c in json.load(open(out.name)) if c.get("shape") == shape]
    rows = {}
    for c in counts:
        if "kernel" in c:
            key = (shape, c["name"], c["kernel"], str(c["blocks"]))
            figures = (over(c["sectors"], c["fewest_sectors"]), over(c["bytes_moved"], c["fewest_bytes"]),
                       over(c["wavefronts"], c["fewest_wavefronts"]), None)
        elif "fewest_mma" in c:
            key, figures = (shape, c["name"], "all", ""), (None, None, None, over(c["mma"], c["fewest_mma"]))
        else:
            continue
        rows.setdefault(key, figures)  # launches of one kind once
    return rows


def too_much(key, figures):
    """What of a row is over its budget."""
    shape, op, kernel, blocks = key
    sectors, bytes_, wavefronts, mma = figures
    product, attention = op.startswith("linear"), op.startswith("attention")
    if mma is not None:
        most = ATTENTION if attention else PRODUCTS
        return [f"mma {mma:.2f}, budget {most}"] if mma > most else []
    found = []
    if int(blocks) <= 1:
        return found
    if sectors is not None and sectors > SECTORS and op != "rkv_select":
        found.append(f"sectors {sectors:.2f}, budget {SECTORS}")
    if not product and not attention and op != "rkv_select" and bytes_ is not None and bytes_ > ELEMENTWISE_BYTES:
        found.append(f"bytes {bytes_:.3f}, budget {ELEMENTWISE_BYTES}")
    if (product or attention) and wavefronts is not None and wavefronts > WAVEFRONTS + 0.005:
        found.append(f"wavefronts {wavefronts:.2f}, budget {WAVEFRONTS}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--shape", nargs="+", default=["llama1b", "qwen05b", "llama3b"])
    parser.add_argument("--filter", default=ALL)
    args = parser.parse_args()
    rows = {}
    for shape in args.shape:
        rows.update(rows_of(shape, args.filter))
    bad = [f"{' '.join(key)}: {what}" for key, figures in rows.items() for what in too_much(key, figures)]
    compiled, _, counted = DOC.read_text().partition("\n" + TITLE)
    if args.check:
        known = {}
        for line in counted.splitlines():
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            if len(cells) == 8:
                known[tuple(cells[:4])] = cells[4:]
        for key, figures in rows.items():
            cells = known.get(key)
            if cells is None or any((f is None) != (cell == "") or f is not None and abs(f - float(cell)) > 0.025
                                    for f, cell in zip(figures, cells)):
                bad.append(f"{' '.join(key)}: {figures} is not in {DOC.name}, which has {cells}: run tools/kernel_counts.py")
        print(f"kernel_counts: {len(rows)} rows, {len(bad)} over a budget or not current")
    else:
        lines = ["| " + " | ".join([*key, *("" if f is None else f"{f:.2f}" for f in figures)]) + " |" for key, figures in rows.items()]
        DOC.write_text(compiled + "\n" + HEAD + "\n".join(lines) + "\n")
    for what in bad:
        print(f"kernel_counts: {what}", file=sys.stderr)
    return 1 if bad else 0


sys.exit(main())

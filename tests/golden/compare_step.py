"""Compares the output of `kava_inspect step` with the reference for any configuration the reference knows.

    python compare_step.py CONFIG.toml STEP.safetensors [--adapter DIR] [--set a.b=VALUE]... [--dtype f64|f32]

f64: every floating tensor within 1e-9 of the f64 reference, relative in the root-mean-square norm.
f32: within 10 times the error of the reference's own f32 step against its f64 step, plus 1e-6.
Integer tensors must be equal. Prints every tensor, worst first, and ends with 1 when one is over its bound, missing or extra.
Without an adapter the LoRA gradients are not compared (B is zero, A is the engine's own), and latent.projection must be off.
"""
import argparse
import sys

import torch
from safetensors.torch import load_file

import reference_inputs as inputs
import reference_step as reference
from reference_checks import relative_error


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("step")
    parser.add_argument("--adapter", help="adapter folder, instead of model.adapter")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=VALUE")
    parser.add_argument("--dtype", choices=("f64", "f32"), default="f64")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def bounds(config, rows, adapter, dtype):
    """(exact tensors, bound per floating tensor, margin of the selection)."""
    exact, margin = reference.step(reference.Model(config, torch.float64, adapter), rows)
    floating = [name for name, tensor in exact.items() if tensor.is_floating_point()]
    if dtype == "f64":
        return exact, dict.fromkeys(floating, 1e-9), margin
    single, _ = reference.step(reference.Model(config, torch.float32, adapter), rows)
    return exact, {name: 10 * relative_error(single[name], exact[name]) + 1e-6 for name in floating}, margin


def judge(found, exact, limits):
    """Rows of (error / limit, name, text)."""
    for name in sorted(set(found) | set(exact)):
        if name not in found or name not in exact:
            yield float("inf"), name, "missing" if name not in found else "not expected"
        elif found[name].shape != exact[name].shape:
            yield float("inf"), name, f"shape {tuple(found[name].shape)}, expected {tuple(exact[name].shape)}"
        elif name not in limits:
            different = int((found[name].long() != exact[name].long()).sum())
            yield (float("inf") if different else 0.0), name, f"{different} of {exact[name].numel()} integers differ"
        else:
            error = relative_error(found[name], exact[name])
            error = error if error == error else float("inf")
            yield error / limits[name], name, f"error {error:.2e}  bound {limits[name]:.2e}"


def main():
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    config = inputs.load_config(arguments.config, arguments.set)
    adapter = arguments.adapter or config["model"]["adapter"]
    exact, limits, margin = bounds(config, inputs.load_rows(config), adapter, arguments.dtype)
    found = load_file(arguments.step)
    if not adapter:
        exact, found = ({name: x for name, x in side.items() if ".lora_" not in name} for side in (exact, found))
    verdicts = sorted(judge(found, exact, limits), reverse=True)
    for ratio, name, text in verdicts:
        print(f"{'BAD ' if ratio > 1 else 'ok  '} {name:80} {text}")
    bad = sum(ratio > 1 for ratio, _, _ in verdicts)
    print(f"{bad} of {len(verdicts)} tensors over their bound; worst at {verdicts[0][0]:.2g} of it ({verdicts[0][1]}); "
          f"smallest margin of the selection {margin:.1e}")
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except inputs.Unsupported as problem:
        sys.exit(f"error: {problem}")

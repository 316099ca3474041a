#!/usr/bin/env python3
"""What a run's safety and its views cost, measured on one configuration:

    overheads.py CONFIG.toml [--bin DIR] [--steps N] [--set KEY=VALUE]...

Two runs as they are and two with --profile, in turn, then one of half the steps with --check-ops, each of the same steps. A step's own
seconds are those of metrics.jsonl; what lies between the lines of two steps beside them went into metrics, progress and the search for spikes,
and, where one is due, into a checkpoint. Prints a line for each limit; ends with 1 where one is passed. For an idle machine.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

CHECKPOINT_EVERY = 50  # steps, of which one checkpoint's time is a share


def run(arguments, out, steps, *options):
    """Seconds of each step, and those between its line and the next one's beside the next step's: with a checkpoint, without one."""
    command = [str(arguments.bin / "kava_train"), str(arguments.config), "--out", str(out), *options]
    for key in (f"train.max_steps={steps}", "train.checkpoint_every=2", "train.log_every=1", "data.valid=", *arguments.set):
        command += ["--set", key]
    told, saved = {}, set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            words = line.split()
            if line.startswith("step "):
                told[int(words[1].split("/")[0].replace(",", ""))] = time.monotonic()
            elif line.startswith("checkpoint of step "):
                saved.add(int(words[3]))
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    until = {line["step"]: line["seconds"] for line in lines if "step" in line}
    seconds = {n: until[n] - until[n - 1] for n in until if n > 1}
    beside = {n: told[n] - told[n - 1] - seconds[n] for n in seconds}
    return seconds, [b for n, b in beside.items() if n - 1 in saved], [b for n, b in beside.items() if n - 1 not in saved]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=pathlib.Path)
    parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path("build/cpu/bin"))
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    plain, profiled, saving, telling = {}, {}, [], []
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder)
        for turn in range(2):
            seconds, with_checkpoint, without = run(arguments, out / f"plain{turn}", arguments.steps)
            saving += with_checkpoint
            telling += without
            for kept, found in ((plain, seconds), (profiled, run(arguments, out / f"profiled{turn}", arguments.steps, "--profile")[0])):
                for n, s in found.items():
                    kept[n] = min(s, kept.get(n, s))
        checked = run(arguments, out / "checked", max(3, arguments.steps // 2), "--check-ops")[0]
    step, tell = statistics.mean(plain.values()), statistics.median(telling)
    save = statistics.median(saving) - tell
    print(f"{'step':<44}{step:>10.3f} s")
    passed = False
    for name, value, limit, unit in (
            (f"a checkpoint ({save:.3f} s) every {CHECKPOINT_EVERY} steps", 100 * save / (CHECKPOINT_EVERY * step), 1, "%"),
            (f"metrics, progress and spikes ({1e3 * tell:.2f} ms)", 100 * tell / step, 0.5, "%"),
            ("--profile", 100 * (sum(profiled.values()) / sum(plain.values()) - 1), 3, "%"),
            ("--check-ops", sum(checked.values()) / sum(plain[n] for n in checked), 3, "times a step")):
        passed = passed or value > limit
        print(f"{name:<44}{value:>10.3f} {unit}, at most {limit}")
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main())

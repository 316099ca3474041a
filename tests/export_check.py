#!/usr/bin/env python3
"""export_check.py [TRACKER...]: tools/export_metrics.py for real, offline, read back by each tracker's own reader.

A run that went back to a checkpoint is exported twice, by every tracker whose package is installed: each point must be there once, with its
later value. Trackers that are named must be installed. The last line is a summary; exit 0, 1, or 4 where no tracker is installed.
"""
import importlib.util
import json
import os
import subprocess
import sys
import tempfile

EXPORT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'tools', 'export_metrics.py')


def make_run(folder):
    run = os.path.join(folder, 'runs', 'first')
    os.makedirs(run)
    with open(os.path.join(run, 'config.toml'), 'w') as f:
        f.write('method = "kava"\nseed = 42\n\n[train]\nlr = 0.001\n')
    with open(os.path.join(run, 'metrics.jsonl'), 'w') as f:
        for step in (1, 2, 3, 4, 5):
            f.write(json.dumps({'step': step, 'loss': 10.0 * step, 'seconds': float(step)}) + '\n')
        f.write(json.dumps({'valid': {'step': 5, 'strict': 0.125}}) + '\n')
        for step in (4, 5, 6):  # on from the checkpoint of step 3
            f.write(json.dumps({'step': step, 'loss': 0.5 * step, 'seconds': float(step)}) + '\n')
        f.write(json.dumps({'valid': {'step': 6, 'strict': 0.25}}) + '\n')
        f.write('{"step": 7, "lo')  # not whole yet
    return run


def expected():
    loss = {1: 10.0, 2: 20.0, 3: 30.0, 4: 2.0, 5: 2.5, 6: 3.0}
    return {'loss': sorted(loss.items()), 'valid/strict': [(6, 0.25)]}


def read_tensorboard(out, names):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(out, size_guidance={'scalars': 0})
    events.Reload()
    return {n: [(e.step, e.value) for e in events.Scalars(n)] for n in names}


def read_mlflow(out, names):
    from mlflow.tracking import MlflowClient
    client = MlflowClient('sqlite:///' + os.path.join(out, 'mlflow.db'))
    experiment = client.get_experiment_by_name('kava')
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1, f'{len(runs)} runs'
    return {n: [(m.step, m.value) for m in client.get_metric_history(runs[0].info.run_id, n)] for n in names}


def read_trackio(out, names):
    found = {}
    for n in names:
        command = [os.path.join(os.path.dirname(sys.executable), 'trackio'), 'get', 'metric', '--project', 'kava', '--run', 'runs/first']
        text = subprocess.run([*command, '--metric', n, '--json'],
                              env={**os.environ, 'TRACKIO_DIR': out}, capture_output=True, text=True, check=True).stdout
        whole = json.loads(text)
        found[n] = [(v['step'], v['value']) for v in whole['values']]
    return found


def read_wandb(out, names):
    folders = [os.path.join(out, 'wandb', f) for f in os.listdir(os.path.join(out, 'wandb')) if f.startswith('offline-run')]
    assert len(folders) == 1, f'{len(folders)} runs'
    program = os.path.join(os.path.dirname(sys.executable), 'wandb')
    text = subprocess.run([program, 'leet', 'inspect', '--json', folders[0]], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, check=True).stdout
    found = {n: [] for n in names}
    for line in text.splitlines():
        record = json.loads(line)
        if record.get('type') != 'history':
            continue
        row = record['history']['item']
        for n in names:
            if n in row:
                found[n].append((int(row['_step']), row[n]))
    return found


READERS = {'tensorboard': read_tensorboard, 'mlflow': read_mlflow, 'trackio': read_trackio, 'wandb': read_wandb}


def main():
    present = [t for t in (sys.argv[1:] or READERS) if importlib.util.find_spec(t)]
    if not present:
        print('skipped: none of ' + ', '.join(READERS) + ' is installed')
        return 4
    bad = len(set(sys.argv[1:]) - set(present))
    if bad:
        print('not installed: ' + ', '.join(set(sys.argv[1:]) - set(present)))
    for tracker in present:
        with tempfile.TemporaryDirectory() as folder:
            run, out = make_run(folder), os.path.join(folder, 'out')
            for _ in range(2):
                done = subprocess.run([sys.executable, EXPORT, '--to', tracker, '--out', out, run], capture_output=True, text=True)
                if done.returncode:
                    print(tracker, done.stdout, done.stderr)
            wanted = expected()
            try:
                found = READERS[tracker](out, list(wanted))
            except Exception as e:  # whatever a reader does not find is a fault of the export
                found = repr(e)
            good = isinstance(found, dict) and all([(int(s), float(v)) for s, v in found[n]] == wanted[n] for n in wanted)
            print(f'{tracker}: {"good" if good else f"bad: {found}"}')
            bad += not good
    print(f'{len(present)} trackers, {bad} bad')
    return 1 if bad else 0


sys.exit(main())

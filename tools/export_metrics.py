#!/usr/bin/env python3
"""Hands the metrics of a run to a tracker, offline: export_metrics.py --to tensorboard|wandb|trackio|mlflow [--follow] [--out DIR] RUN

Needs the tracker's own package and nothing else. The export lies in RUN/log/TRACKER (or --out) and is made anew by every call, so
that no point is there twice; where a run went back to a checkpoint, the points that it did again count once, by their later values.
With --follow it grows until no process trains the run any more. Validation stands at its step as valid/NAME.
"""
import argparse
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time

MARK = '.kava_export'
PAUSE = 2.0  # seconds between looks at a growing file


class Failure(Exception):
    """One line for a person, and the exit code."""

    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


def numbers(prefix, values):
    out = {}
    for name, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            out[prefix + name] = float(value)
    return out


def read_rows(path):
    """[(step, seconds, {name: number})], steps ascending; a line that is not whole yet is left for later."""
    rows = {}
    seconds, last = 0.0, 0
    with open(path, 'rb') as f:
        for number, line in enumerate(f, 1):
            if not line.endswith(b'\n'):
                break
            try:
                whole = json.loads(line.decode('utf-8'))
                valid = whole.get('valid')
                values = valid if valid is not None else whole
                step = int(values['step'])
                found = numbers('valid/' if valid is not None else '', {k: v for k, v in values.items() if k != 'step'})
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
                raise Failure(4, f'{path}:{number}: is no object with a step and numbers; remove the line') from e
            if valid is None:
                if step <= last:  # the run went back: what it does again replaces what it did
                    rows = {s: row for s, row in rows.items() if s < step}
                last = step
                seconds = found.get('seconds', seconds)
            at, old = rows.get(step, (seconds, {}))
            rows[step] = (at, {**old, **found})
    return [(step, *rows[step]) for step in sorted(rows)]


def read_config(run):
    """config.toml as flat text values."""
    out, section = {}, ''
    with open(os.path.join(run, 'config.toml'), encoding='utf-8', errors='replace') as f:
        for line in f:
            line = line.strip()
            if line.startswith('['):
                section = line.strip('[]') + '/'
            elif ' = ' in line:
                name, value = line.split(' = ', 1)
                out[section + name] = value.strip('"')
    return out


class TensorBoard:
    def __init__(self, out, name, config, begin):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        self.event, self.summary, self.begin = event_pb2.Event, summary_pb2.Summary, begin
        self.writer = EventFileWriter(out)

    def add(self, rows):
        for step, seconds, values in rows:
            summary = self.summary(value=[self.summary.Value(tag=n, simple_value=v) for n, v in values.items()])
            self.writer.add_event(self.event(wall_time=self.begin + seconds, step=step, summary=summary))
        self.writer.flush()

    def close(self):
        self.writer.close()


class Wandb:
    def __init__(self, out, name, config, begin):
        os.environ['WANDB_MODE'] = 'offline'
        import wandb
        self.begin = begin
        settings = wandb.Settings(console='off', silent=True, x_transaction_log_flush_interval=1.0)
        identity = hashlib.sha256(name.encode()).hexdigest()[:12]
        self.run = wandb.init(project='kava', dir=out, name=name, id=identity, config=config, settings=settings)

    def add(self, rows):
        for step, seconds, values in rows:
            self.run.log({**values, '_timestamp': self.begin + seconds}, step=step)

    def close(self):
        self.run.finish()


class Trackio:
    def __init__(self, out, name, config, begin):
        os.environ['TRACKIO_DIR'] = out
        import trackio
        self.trackio = trackio
        self.run = trackio.init(project='kava', name=name, resume='allow', config=config, auto_log_cpu=False, auto_log_gpu=False)

    def add(self, rows):
        for step, _, values in rows:
            self.trackio.log(values, step=step)

    def close(self):
        self.trackio.finish()


class Mlflow:
    def __init__(self, out, name, config, begin):
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient
        self.metric, self.begin = Metric, begin
        self.client = MlflowClient('sqlite:///' + os.path.join(os.path.abspath(out), 'mlflow.db'))
        experiment = self.client.get_experiment_by_name('kava')
        artifacts = os.path.join(os.path.abspath(out), 'artifacts')
        number = experiment.experiment_id if experiment else self.client.create_experiment('kava', artifacts)
        self.id = self.client.create_run(number, run_name=name).info.run_id
        params = [Param(k, v[:500]) for k, v in config.items()]
        for i in range(0, len(params), 90):
            self.client.log_batch(self.id, params=params[i:i + 90])

    def add(self, rows):
        metrics = [self.metric(n, v, int(1000 * (self.begin + s)), step) for step, s, values in rows for n, v in values.items()]
        for i in range(0, len(metrics), 1000):
            self.client.log_batch(self.id, metrics=metrics[i:i + 1000])
        # Its database gives infinities back as the largest finite numbers.
        for m in metrics:
            if math.isinf(m.value):
                self.client.set_tag(self.id, 'infinite.' + m.key, str(m.step))

    def close(self):
        self.client.set_terminated(self.id)


TRACKERS = {'tensorboard': TensorBoard, 'wandb': Wandb, 'trackio': Trackio, 'mlflow': Mlflow}


def empty_folder(out, run):
    """The export's folder, emptied. What no export has made is not touched."""
    mark = os.path.join(out, MARK)
    if os.path.isdir(out) and os.listdir(out) and not os.path.isfile(mark):
        raise Failure(2, f'--out {out}: holds other files; name a folder that is empty or not there')
    if os.path.realpath(out) == os.path.realpath(run):
        raise Failure(2, f'--out {out}: is the run itself; name another folder')
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    with open(mark, 'w', encoding='utf-8') as f:
        f.write('export_metrics.py\n')


class Export:
    def __init__(self, arguments):
        self.run = arguments.RUN
        self.metrics = os.path.join(self.run, 'metrics.jsonl')
        self.out = arguments.out or os.path.join(self.run, 'log', arguments.to)
        self.tracker = TRACKERS[arguments.to]
        self.name = '/'.join(os.path.abspath(self.run).split(os.sep)[-2:])
        self.sink, self.done = None, []

    def begin(self):
        config = read_config(self.run)
        # Of the run and not of the clock, so that the same run gives the same points.
        began = os.stat(os.path.join(self.run, 'config.toml')).st_mtime
        empty_folder(self.out, self.run)
        self.sink, self.done = self.tracker(self.out, self.name, config, began), []

    def update(self, ended=True):
        """Exports what is new; where the run went back, all of it again. Returns how many steps are new."""
        rows = read_rows(self.metrics)
        if not ended:
            rows = rows[:-1]  # a validation may still come to the last step
        if self.sink is None or rows[:len(self.done)] != self.done:
            self.end()
            self.begin()
        new = rows[len(self.done):]
        self.sink.add(new)
        self.done = rows
        return len(new)

    def end(self):
        if self.sink is not None:
            self.sink.close()
        self.sink = None


def is_trained(run):
    """Whether a process of this machine holds the run's folder locked, as kava_train does while it works there.

    It looks on: a lock taken to try would refuse a kava_train that begins at that moment.
    """
    inode = f':{os.stat(run).st_ino} '  # without the device, which some file systems give otherwise than stat
    with open('/proc/locks', encoding='ascii') as f:
        return any(' FLOCK ' in line and inode in line for line in f)


def follow(export):
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.append(1))
    while not stopped:
        ended = not is_trained(export.run)
        if os.path.exists(export.metrics):
            export.update(ended)
        elif ended:
            raise Failure(4, f'{export.metrics}: no such file; the run has logged nothing')
        if ended:
            return
        time.sleep(PAUSE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('RUN')
    parser.add_argument('--to', required=True, choices=sorted(TRACKERS))
    parser.add_argument('--out', help='default: RUN/log/TRACKER')
    parser.add_argument('--follow', action='store_true', help='go on until no process trains the run')
    arguments = parser.parse_args()
    try:
        if importlib.util.find_spec(arguments.to) is None:
            raise Failure(3, f'--to {arguments.to}: its package is not installed; pip install {arguments.to}')
        if not os.path.isfile(os.path.join(arguments.RUN, 'config.toml')):
            raise Failure(4, f'{arguments.RUN}: is no run: it holds no config.toml; name the folder that kava_train wrote')
        export = Export(arguments)
        if arguments.follow:
            follow(export)
        else:
            if not os.path.isfile(export.metrics):
                raise Failure(4, f'{export.metrics}: no such file; the run has logged nothing yet')
            export.update()
        steps = len(export.done)
        export.end()
    except Failure as e:
        print(f'error: {e}', file=sys.stderr)
        return e.code
    except OSError as e:
        print(f'error: {e}', file=sys.stderr)
        return 7
    print(f'{export.out}: {steps} steps')
    return 0


if __name__ == '__main__':
    sys.exit(main())

#!/usr/bin/env python3
"""report_page.py [--bin DIR]: pages of kava_report in a real browser, without a network.

Opens pages in headless chromium by its protocol over a pipe: of a table that replicate made; of one of its runs with 10,000 steps of every
metric, controls, sweeps and a probe; and with a probe of the size that a model of 28 layers gives. No error on the console, every figure is
there and has a size, no request but the page itself, loaded within a second, at most 3 MB. The last line is a summary; exit 0, 1, or 4
where there is no chromium.
"""
import argparse
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile


class Browser:
    def __init__(self, folder):
        self.to_read, to_write = os.pipe()  # the browser reads commands
        from_read, self.from_write = os.pipe()
        self.commands, self.answers = to_write, from_read

        def descriptors():
            # 3 and 4, whatever numbers the pipes have: moved out of the way first.
            read, write = os.dup(self.to_read), os.dup(self.from_write)
            while read in (3, 4):
                read = os.dup(read)
            while write in (3, 4):
                write = os.dup(write)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self.process = subprocess.Popen(
            ['chromium', '--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-pipe', '--user-data-dir=' + folder,
             'about:blank'],
            preexec_fn=descriptors, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(self.to_read)
        os.close(self.from_write)
        self.number, self.rest, self.events = 0, b'', []

    def message(self):
        while b'\0' not in self.rest:
            some = os.read(self.answers, 1 << 16)
            if not some:
                raise RuntimeError('the browser went away')
            self.rest += some
        line, self.rest = self.rest.split(b'\0', 1)
        return json.loads(line)

    def call(self, method, session=None, **parameters):
        self.number += 1
        command = {'id': self.number, 'method': method, 'params': parameters}
        if session:
            command['sessionId'] = session
        os.write(self.commands, json.dumps(command).encode() + b'\0')
        while True:
            answer = self.message()
            if answer.get('id') == self.number:
                if 'error' in answer:
                    raise RuntimeError(answer['error'])
                return answer['result']
            self.events.append(answer)

    def until(self, method):
        while not any(e.get('method') == method for e in self.events):
            self.events.append(self.message())


METRICS = ('loss', 'student_ce', 'teacher_ce', 'kv', 'codi', 'lr', 'grad_norm', 'grad_student_ce', 'grad_teacher_ce', 'grad_kv', 'grad_codi',
           'samples_per_s', 'tokens_per_s', 'mfu', 'memory_bytes', 'latent_norm_ratio', 'stage')
VALIDATIONS = ('strict', 'forced', 'loss', 'student_ce', 'teacher_ce')
RUN = ('loss', 'validation', 'validation_loss', 'rate', 'gradient', 'throughput', 'use', 'memory', 'latents_norm', 'stage', 'results',
       'controls', 'questions', 'e1_questions', 'e2_sweep', 'e2_questions')
PROBE = ('latents', 'similarity_k', 'similarity_v', 'kept', 'kept1', 'kept2', 'kept3')
TABLE = ('accuracy', 'passes', 'ms', 'comparisons', 'questions', 'numbers')
TABLE_FILE = """
seeds = [42]
reference = "other"
synth = { rows = 200, seed = 42 }
[[column]]
name = "test"
data = "{out}/data/test.txt"
limit = 20
"""
ROW = """
[[row]]
name = "NAME"
config = "CONFIG"
set = ["latent.iterations=PASSES", "model.path={out}/data/model", "model.init=random", 'data.train=["{out}/data/train.txt"]', "data.valid=",
       "train.max_steps=2", "train.batch=4"]
groups = ["NAME"]
published = [{ column = "test", value = 50.0, source = "nowhere" }]
"""


def write_metrics(path):
    with open(path, 'w') as f:
        for s in range(1, 10001):
            f.write(json.dumps({'step': s, **{name: 2 + i + math.sin(s) for i, name in enumerate(METRICS)}}) + '\n')
            if s % 500 == 0:
                f.write(json.dumps({'valid': {'step': s, **{name: s / 10000 for name in VALIDATIONS}}}) + '\n')


def write_probe(path):
    """A probe as of 28 layers with 8 key/value heads, 24 latents, and traces of 700 tokens; no two neighbours alike."""
    layers, heads, latents, questions, trace = 28, 8, 24, 4, 700
    draw = random.Random(1)
    values = {
        'latent.top': ('I32', [4, questions, latents], [draw.randrange(9) for _ in range(4 * questions * latents)]),
        'latent.nearest': ('I32', [4, questions, latents], [draw.randrange(9) for _ in range(4 * questions * latents)]),
        'rkv.kept': ('I32', [questions, layers, heads, latents],
                     [k for _ in range(questions * layers * heads) for k in sorted(draw.sample(range(trace), latents))]),
        'trace.ids': ('I32', [questions * trace], [draw.randrange(9) for _ in range(questions * trace)]),
        'trace.offsets': ('I32', [questions + 1], [trace * i for i in range(questions + 1)])}
    for which in 'kv':
        values['similarity.' + which] = ('F32', [layers, heads, latents, latents],
                                         [draw.uniform(-1, 1) for _ in range(layers * heads * latents * latents)])
    about = {'method': 'kava', 'weights': 'best', 'data': '0' * 64, 'passes': [0, 1, 2, 3],
             'questions': [{'question': f'Question {i}?', 'gold': '1', 'output': '2'} for i in range(questions)],
             'tokens': {str(i): f'w{i}' for i in range(9)}}
    header, data = {'__metadata__': {'kava.probe': json.dumps(about)}}, b''
    for name, (dtype, shape, numbers) in values.items():
        whole = struct.pack('<%d%s' % (len(numbers), 'i' if dtype == 'I32' else 'f'), *numbers)
        header[name] = {'dtype': dtype, 'shape': shape, 'data_offsets': [len(data), len(data) + len(whole)]}
        data += whole
    text = json.dumps(header).encode()
    with open(path, 'wb') as f:
        f.write(struct.pack('<Q', len(text)) + text + data)


def make_pages(bin_folder, folder):
    """[(page, ids of its figures)]"""
    def run(program, *arguments):
        done = subprocess.run([os.path.join(bin_folder, program), *arguments], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f'{program} ended with {done.returncode}: {done.stderr}')

    out, table = os.path.join(folder, 'out'), os.path.join(folder, 'table.toml')
    kava, test = os.path.join(out, 'runs', 'kava', '42'), os.path.join(out, 'data', 'test.txt')
    config = os.path.abspath(os.path.join(os.path.dirname(__file__), '..', 'configs', 'quickstart.toml'))
    with open(table, 'w') as f:
        f.write(TABLE_FILE)
        for name, passes in (('kava', '3'), ('other', '1')):
            f.write(ROW.replace('NAME', name).replace('PASSES', passes).replace('CONFIG', config))
    run('replicate', table, '--out', out, '--times', '--jobs', '1')
    write_metrics(os.path.join(kava, 'metrics.jsonl'))
    run('kava_eval', kava, '--data', test, '--limit', '20', '--controls')
    run('kava_eval', kava, '--data', test, '--limit', '20', '--sweep-latents', '13..14')
    pages = [(os.path.join(out, 'report.html'), TABLE)]
    made, large = os.path.join(folder, 'made.safetensors'), os.path.join(folder, 'large.safetensors')
    run('kava_inspect', 'probe', kava, '--data', test, '--out', made)
    write_probe(large)
    for probe in (made, large):
        pages.append((probe + '.html', RUN + PROBE))
        run('kava_report', kava, '--probe', probe, '--out', probe + '.html')
    return pages


def look(page, wanted, folder):
    """What is wrong with the page, after a line about it."""
    browser = Browser(os.path.join(folder, 'profile_' + os.path.basename(page)))
    try:
        target = browser.call('Target.createTarget', url='about:blank')['targetId']
        session = browser.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            browser.call(domain + '.enable', session)

        def value(expression):
            return browser.call('Runtime.evaluate', session, expression=expression, returnByValue=True)['result']['value']

        def load_time():
            browser.events.clear()
            browser.call('Page.navigate', session, url='file://' + page)
            browser.until('Page.loadEventFired')
            return value('performance.getEntriesByType("navigation")[0].loadEventEnd')

        load = load_time()
        for _ in range(4):  # a machine that does other work takes longer now and then
            load = load if load <= 1000 else min(load, load_time())
        figures = value('[...document.querySelectorAll("figure")].map(f => [f.id, f.getBoundingClientRect().height])')
        wide = value('document.documentElement.scrollWidth <= innerWidth ? "" : [...document.querySelectorAll("body *")].filter('
                     'e => e.getBoundingClientRect().right > innerWidth).map(e => e.tagName + " " + e.id).slice(0, 5).join()')
        events = browser.events
    finally:
        browser.process.kill()
        browser.process.wait()
    faults = [f'{name} has no height' for name, height in figures if height < 40]
    if [f[0] for f in figures] != list(wanted):
        faults.append(f'its figures are {[f[0] for f in figures]}, not {list(wanted)}')
    for e in events:
        method, p = e.get('method'), e.get('params', {})
        if method == 'Runtime.exceptionThrown' or (method == 'Runtime.consoleAPICalled' and p['type'] == 'error') or (
                method == 'Log.entryAdded' and p['entry']['level'] == 'error'):
            faults.append('on the console: ' + json.dumps(p)[:200])
        if method == 'Network.requestWillBeSent' and not p['request']['url'].startswith(('file://' + page, 'data:')):
            faults.append('asks for ' + p['request']['url'])
    if load > 1000:
        faults.append(f'loaded after {load:.0f} ms')
    if wide:
        faults.append('is wider than the window: ' + wide)
    size = os.path.getsize(page)
    if size > 3_000_000:
        faults.append(f'has {size} bytes')
    for fault in faults:
        print(fault)
    print(f'{os.path.basename(page)}: {len(figures)} figures, {size} bytes, loaded after {load:.0f} ms')
    return faults


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--bin', default='build/cpu/bin')
    arguments = parser.parse_args()
    if not shutil.which('chromium'):
        print('skipped: no chromium here')
        return 4
    with tempfile.TemporaryDirectory() as folder:
        pages = make_pages(os.path.abspath(arguments.bin), folder)
        bad = sum(bool(look(page, wanted, folder)) for page, wanted in pages)
    print(f'{len(pages)} pages, {bad} bad')
    return 1 if bad else 0


sys.exit(main())

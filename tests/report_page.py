#!/usr/bin/env python3
"""report_page.py [--bin DIR]: a page of kava_report in a real browser, without a network.

Opens the page of a run of 10,000 steps in headless chromium by its protocol over a pipe: no error on the console, every figure has a size,
no request but the page itself, loaded within a second. The last line is a summary; exit 0, 1, or 4 where there is no chromium.
"""
import argparse
import json
import math
import os
import shutil
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


def make_run(bin_folder, folder):
    """A run of a few updates on the embedded task, with the metrics of a long one."""
    def run(*words):
        subprocess.run([os.path.join(bin_folder, words[0]), *words[1:]], check=True, stdout=subprocess.DEVNULL)

    data, run_folder, probe, page = (os.path.join(folder, n) for n in ('data', 'run', 'probe.safetensors', 'page.html'))
    run('kava_data', 'synth', '--out', data, '--rows', '200')
    config = os.path.join(os.path.dirname(__file__), '..', 'configs', 'quickstart.toml')
    run('kava_train', config, '--out', run_folder, '--set', f'model.path={data}/model', '--set', 'model.init=random', '--set',
        f'data.train=["{data}/train.txt"]', '--set', 'data.valid=', '--set', 'train.max_steps=2', '--set', 'train.batch=4')
    with open(os.path.join(run_folder, 'metrics.jsonl'), 'w') as f:
        for s in range(1, 10001):
            f.write(json.dumps({'step': s, 'loss': 2 + math.sin(s), 'student_ce': 1.0, 'grad_norm': 1.0 + s % 5, 'lr': 1e-3 / s}) + '\n')
            if s % 500 == 0:
                f.write(json.dumps({'valid': {'step': s, 'strict': s / 10000, 'forced': 0.5, 'loss': 1.0}}) + '\n')
    run('kava_eval', run_folder, '--data', data + '/test.txt', '--limit', '50')
    run('kava_inspect', 'probe', run_folder, '--data', data + '/test.txt', '--out', probe)
    run('kava_report', run_folder, '--probe', probe, '--out', page)
    return page


def look(page, folder):
    browser = Browser(os.path.join(folder, 'profile'))
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
    for name in ('loss', 'validation', 'rate', 'gradient', 'results', 'questions', 'latents', 'similarity_k', 'similarity_v', 'kept'):
        if name not in [f[0] for f in figures]:
            faults.append(f'no figure {name}')
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
    print(f'{len(figures)} figures, {size} bytes, loaded after {load:.0f} ms: {"bad" if faults else "good"}')
    return 1 if faults else 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--bin', default='build/cpu/bin')
    arguments = parser.parse_args()
    if not shutil.which('chromium'):
        print('skipped: no chromium here')
        return 4
    with tempfile.TemporaryDirectory() as folder:
        return look(make_run(os.path.abspath(arguments.bin), folder), folder)


sys.exit(main())

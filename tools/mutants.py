#!/usr/bin/env python3
"""Breaks the CUDA kernels in one place at a time and sees whether the tests notice.

One program holds all mutants: in a copy of the kernels each place asks whether it is the chosen one (tests/simt/mutant.h). Of the tests of
ops and kernels each first runs once by itself, to tell its time and where it does what a mutant would do otherwise; a mutant runs only
under these, the quickest first, and is caught by the first that fails, crashes, or takes five times its processor's time and at least ten
seconds of one.

  barrier  __syncthreads() left out         wait    one group of copies too few is waited for, or a group is not closed
  guard    an `if` as if true; one that only leaves (return, continue, break, throw), as if false
  part     an operand of && as if true, of || as if false
  mask     a choice of ?: taken always: not the one that is 0, -infinity or nothing, else the first; `&= x`: all of it
  bound    a comparison one further          clamp   the second argument of fmax, fmin, clamp's first, as if within
  rescale  a factor left out

No mutants are conditions that are known when the kernel is compiled, and ends of unrolled loops. Mutants that change no result stand in
tests/kernels/mutants.txt with the reason and do not run.

Usage: tools/mutants.py [--all | --sample N] [--seed S] [--build DIR] [--list] [FILE[:LINE]...]
       every mutant of kernels/ or of FILE...; or N (10) of one file drawn by S, and then under the tests of that file alone, where neither
       is said. DIR is a build that holds kava_tests: build/cpu
Prints a line for each mutant and `caught N/N`; ends with 1 where one survived for which no reason is given.
"""
import argparse
import concurrent.futures
import glob
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from shlex import quote

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORKERS = 2
REASONS = "tests/kernels/mutants.txt"
# Which tests/*/test_NAME.cpp a sample of a file runs before all others, where that is not its name up to "_" and the kernels' own.
TESTS = {"gemm": ["linear", "gemm_kernels"], "attention": ["attention", "attention_kernels"],
         "tile": ["linear", "attention", "gemm_kernels", "attention_kernels"],
         "chunks": ["rows", "norm", "kernels"], "column_sums": ["norm", "norm_rope", "linear"], "dropout": ["linear", "kernels"],
         "gpu": ["attention"], "norm_rope": ["norm_rope"]}
# Shared with the engine, or replaced in the emulator, or declarations only.
NO_KERNELS = {"bf16.h", "philox.h", "gpu_cuda.h", "gpu_error.h", "kernels.h", "gemm.h", "bytes16.h", "launched.h"}

# ---- places

TOKEN = re.compile(
    r"(?P<skip>\s+|//[^\n]*|/\*.*?\*/|^\#[^\n]*(?:\\\n[^\n]*)*)"
    r'|(?P<text>"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])+\'|[A-Za-z_]\w*|\d[\w.\']*(?:e[+-]\d+f?)?)'
    r"|(?P<op>::|->|\+\+|--|&&|\|\||[=!<>]=|[-+*/%&|^]=|<<|>>|.)",
    re.M | re.S)
ASSIGNS = {"=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^="}
CLOSED_BY = {"(": ")", "[": "]", "{": "}", "<": ">"}
COMPARES = {"<": "less", "<=": "at_most", ">": "more", ">=": "at_least"}
NOTHING = re.compile(r"(0(u|\.f|\.0)?|-INFINITY|nullptr|-1|T\{\}|false)")
KNOWN = re.compile(r"k?[A-Z]\w*|form|[a-z]_by_k|masked|nowhere|operand|scaled_sum|nt|nn|tn|into|sizeof|static_cast|int|bf16")
TYPES = {"float", "double", "T", "int32_t", "const"}
FACTOR = re.compile(r"shrink|scale2?|inverse|factor|root_correction|weight|weights|clip|pull|expf")


class Token:
    def __init__(self, text, begin, end, line, angle):
        self.text, self.begin, self.end, self.line = text, begin, end, line
        self.angle = angle  # a bracket of a template's arguments
        self.pair = None


def tokens_of(source):
    tokens = []
    for m in TOKEN.finditer(source):
        if m.lastgroup == "skip":
            continue
        text, begin, end = m.group(), m.start(), m.end()
        spaced = source[begin - 1].isspace() and source[end:end + 1].isspace()
        line = source.count("\n", 0, begin) + 1
        if text == ">>" and not spaced:
            tokens += [Token(">", begin, begin + 1, line, True), Token(">", begin + 1, end, line, True)]
        else:
            tokens.append(Token(text, begin, end, line, text in "<>" and not spaced))
    opened = []
    for i, t in enumerate(tokens):
        if t.text in "([{" or (t.text == "<" and t.angle):
            opened.append(i)
        elif t.text in ")]}" or (t.text == ">" and t.angle):
            begin = opened.pop()
            assert CLOSED_BY[tokens[begin].text] == t.text, (t.line, t.text)
            t.pair, tokens[begin].pair = begin, i
    assert not opened
    return tokens


class Place:
    """One mutant: what is put around or instead of the tokens begin..end of its file."""
    def __init__(self, file, line, rule, edits):
        self.file, self.line, self.rule, self.edits = file, line, rule, edits
        self.number = self.nth = 0


class Finder:
    def __init__(self, file):
        self.file = file
        self.source = open(os.path.join(ROOT, file)).read()
        self.t = tokens_of(self.source)
        self.places = []
        self.dead = self.known_when_compiled()
        for i, token in enumerate(self.t):
            if i in self.dead:
                continue
            if token.text in COMPARES and not token.angle:
                self.compare(i)
            elif token.text in ("&&", "||") and self.source[token.begin - 1].isspace():
                self.operands(i)
            elif token.text == "?":
                self.choice(i)
            elif token.text == "if":
                self.guard(i)
            elif token.text == "&=":
                self.wrap("mask", i + 1, self.right(i), "mutant::ones(N, ", ")")
            elif token.text.startswith("__syncthreads"):
                argument = self.text(i + 2, self.t[i + 1].pair)
                self.wrap("barrier", i, self.t[i + 1].pair + 1, f"(mutant::without(N) ? {argument or 'void()'} : ", ")")
            elif token.text == "cp_async_wait" and self.t[i + 1].angle:
                pending = self.text(i + 2, self.t[i + 1].pair)
                self.wrap("wait", i, self.t[i + 1].pair + 3, f"(mutant::without(N) ? cp_async_wait<({pending}) + 1>() : ", ")")
            elif token.text == "cp_async_commit":
                self.wrap("wait", i, i + 3, "(mutant::without(N) ? void() : ", ")")
            elif re.fullmatch(r"f(max|min)f?|clamp", token.text):
                self.clamp(i)
            elif FACTOR.fullmatch(token.text):
                self.rescale(i)

    def text(self, begin, end):
        return self.source[self.t[begin].begin:self.t[end - 1].end] if begin < end else ""

    def wrap(self, rule, begin, end, before, after):
        """Tokens begin..end become `before` them `after`; N is the mutant's number."""
        edit = ("around", self.t[begin].begin, self.t[end - 1].end, before, after)
        self.places.append(Place(self.file, self.t[begin].line, rule, [edit]))
        return self.places[-1]

    def known_when_compiled(self):
        """Tokens in constants, template arguments, static_assert and conditions of `if constexpr` and of unrolled loops."""
        dead = set()
        for i, token in enumerate(self.t):
            if token.angle and token.text == "<":
                dead.update(range(i, token.pair))
            elif token.text in ("static_assert", "__launch_bounds__"):
                dead.update(range(i, self.t[i + 1].pair))
            elif token.text == "constexpr" and self.t[i - 1].text == "if":
                dead.update(range(i - 1, self.t[i + 1].pair))
            elif token.text == "constexpr":
                j = i
                while self.t[j].text not in ("=", ";", "{"):
                    j = self.t[j].pair + 1 if self.t[j].text in "(<[" and self.t[j].pair else j + 1
                while self.t[j].text not in (";", "{"):
                    j = self.t[j].pair + 1 if self.t[j].text in "([" and self.t[j].pair else j + 1
                if self.t[j].text == ";":
                    dead.update(range(i, j))
            elif token.text == "for":
                end = self.t[i + 1].pair
                stops = [j for j in range(i, end) if self.t[j].text == ";" and self.outermost(i + 2, j)]
                before = self.source[:token.begin].rstrip().rsplit("\n", 1)[-1].strip()
                if len(stops) == 2 and (before.startswith("#pragma unroll") and before != "#pragma unroll 1" or
                                        re.search(r"[<>]=? [\d.]+$", self.text(stops[0] + 1, stops[1]))):
                    dead.update(range(stops[0], stops[1]))
        return dead

    def outermost(self, begin, i):
        while begin < i:
            pair = self.t[begin].pair
            if pair is not None and pair > i:
                return False
            begin = pair + 1 if pair is not None and pair > begin else begin + 1
        return True

    def left(self, i, stops):
        """The first token of the operand that ends before token i."""
        while i > 0:
            t = self.t[i - 1]
            if t.text in ")]}" or (t.text == ">" and t.angle):
                if t.text == "}" and self.t[t.pair - 1].text in (")", ";", "{", "}", "else"):  # a block
                    return i
                i = t.pair
            elif t.text in stops or t.text in "([{,;?:" or t.text in ASSIGNS or t.text == "return" or (t.text == "<" and t.angle):
                return i
            else:
                i -= 1
        return i

    def right(self, i, stops=()):
        """The end of the operand that begins behind token i."""
        i += 1
        while True:
            t = self.t[i]
            if t.pair is not None and t.pair > i:
                i = t.pair + 1
            elif t.text in stops or t.text in ")]},;?:" or t.text in ASSIGNS or (t.text == ">" and t.angle):
                return i
            else:
                i += 1

    def known(self, begin, end):
        names = [t.text for t in self.t[begin:end] if re.match(r"[A-Za-z_]", t.text)]
        return all(KNOWN.fullmatch(n) for n in names) and ("masked" not in names or "Masked" in names)

    def compare(self, i):
        stops = ("&&", "||", "==", "!=", "|", "^")
        begin, end = self.left(i, stops), self.right(i, stops)
        if self.known(begin, end):
            return
        a, b = self.text(begin, i), self.text(i + 1, end)
        if self.t[end].text == "?":
            j = self.right(end)
            if {self.text(end + 1, j), self.text(j + 1, self.right(j))} == {a, b}:
                return  # the lesser or the greater of two: equal ones are the same
        place = self.wrap("bound", begin, end, f"mutant::{COMPARES[self.t[i].text]}(N, ", ")")
        place.line = self.t[i].line
        place.edits.append(("instead", self.t[i].begin, self.t[i].end, ",", ""))

    def operands(self, i):
        """Both operands where the operator is the first of its chain, else the right one."""
        op = self.t[i].text
        stops = ("&&", "||") if op == "&&" else ("||",)
        begin, end = self.left(i, stops), self.right(i, stops)
        call = "always" if op == "&&" else "never"
        for first, last in ([] if self.t[begin - 1].text == op else [(begin, i)]) + [(i + 1, end)]:
            if not self.known(first, last):
                self.wrap("part", first, last, f"mutant::{call}(N, ", ")")

    def split_by(self, begin, end, op):
        """Whether op stands outside of brackets, and nothing that binds less."""
        outside = [self.t[i].text for i in range(begin, end) if self.outermost(begin, i)]
        return op in outside and "?" not in outside and (op == "||" or "||" not in outside)

    def force(self, rule, begin, end, value):
        if not self.known(begin, end) and not self.split_by(begin, end, "&&" if value else "||"):
            self.wrap(rule, begin, end, f"mutant::{'always' if value else 'never'}(N, ", ")")

    def choice(self, i):
        begin, colon = self.left(i, ()), self.right(i)
        while self.t[colon].text == "?":  # a choice within the first branch
            colon = self.right(self.right(colon))
        if self.t[colon].text != ":":
            return
        first = self.text(i + 1, colon)
        self.force("mask", begin, i, not NOTHING.fullmatch(first))

    def guard(self, i):
        if self.t[i + 1].text != "(":
            return
        begin, end = i + 2, self.t[i + 1].pair
        for j in range(begin, end):
            if self.t[j].text == ";":
                begin = j + 1
        leaves = self.t[end + 1].text in ("return", "continue", "break", "throw")
        self.force("guard", begin, end, not leaves)

    def clamp(self, i):
        j = i + 1
        if self.t[j].angle:
            j = self.t[j].pair + 1
        if self.t[j].text != "(" or self.t[i - 1].text in ("float", "double"):
            return
        comma = self.right(j)
        end = self.t[j].pair
        kept = self.text(j + 1, comma) if self.t[i].text == "clamp" else self.text(comma + 1, end)
        begin = i - 2 if self.t[i - 1].text == "::" else i
        self.wrap("clamp", begin, end + 1, f"(mutant::without(N) ? {kept} : ", ")")

    def rescale(self, i):
        begin, end = i, i + 1
        while self.t[begin - 1].text in (".", "->"):
            begin -= 2
        if self.t[end].text in ("(", "["):
            end = self.t[end].pair + 1
        operator, before = self.t[begin - 1].text, self.t[begin - 2].text
        multiplies = operator in ("*=", "/=") or (operator in "*/" and re.fullmatch(r"[\w)\]]+", before) and before not in TYPES)
        if (multiplies or self.t[end].text == "*") and self.t[end].text not in ASSIGNS:
            self.wrap("rescale", begin, end, "mutant::one(N, ", ")")


def rewritten(source, places):
    """The source with every place asking whether it is the chosen one. Of two places the wider asks first; of equals a bound asks last."""
    pieces = []  # (at, 1: opens or stands there, 0: closes; the order of those; text, what it takes the place of)
    for p in places:
        for kind, begin, end, before, after in p.edits:
            if kind == "instead":
                pieces.append((begin, 1, (0, 0, 0), before, end))
                continue
            order = (begin - end, p.rule == "bound", p.number)
            pieces.append((begin, 1, order, before.replace("(N", f"({p.number}", 1), begin))
            pieces.append((end, 0, tuple(-x for x in order), after, end))
    out, at = [], 0
    for place, _, _, text, end in sorted(pieces):
        out += [source[at:place], text]
        at = max(end, place)
    return "".join(out) + source[at:]


def places_of(files):
    """All places of the files, with what the reasons name them by: FILE: RULE NTH: LINE."""
    places = []
    for file in files:
        finder, seen = Finder(file), {}
        for p in sorted(finder.places, key=lambda p: p.edits[0][1]):
            p.text = finder.source.split("\n")[p.line - 1].strip()
            p.nth = seen[p.rule, p.text] = seen.get((p.rule, p.text), 0) + 1
            p.name = f"{file}: {p.rule} {p.nth}: {p.text}"
            places.append(p)
    return places


# ---- the program

def sources_with(file):
    """The kernels' sources that include a file, itself among them."""
    def includes(path):
        for name in re.findall(r'#include "(kernels/[\w.]+)"', open(path).read()):
            yield name
            yield from includes(name)
    return [f for f in sorted(glob.glob("kernels/*.cu")) if f == file or file in includes(f)]


def build(places, folder, into):
    """The tests with the places' sources compiled anew, from the commands by which `folder` was built."""
    def command_of(target):
        commands = subprocess.run(["ninja", "-C", folder, "-t", "commands", target], check=True, capture_output=True, text=True).stdout
        return commands.splitlines()[-1]

    def run(command):
        done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"mutants: {command}\n{done.stdout[-2000:]}{done.stderr[:4000]}")

    def compile_source(source, kernel, flags):
        command = command_of(f"tests/simt/CMakeFiles/kava_simt.dir/__/__/kernels/{os.path.basename(kernel)}.o").split(" -MD ")[0]
        command = command.replace(" -I", f" -I{quote(into)} -I", 1)
        run(f"{command} {flags} -w -o {quote(source)}.o -c {quote(source)}")
        return f"{source}.o"

    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree("kernels", f"{into}/kernels")
    for file in {p.file for p in places}:
        text = rewritten(open(file).read(), [p for p in places if p.file == file])
        with open(f"{into}/{file}", "w") as out:
            out.write(text)
    sources = sorted({s for p in places for s in sources_with(p.file)}, key=os.path.getsize, reverse=True)
    # Products and sums stay apart: which of them GCC fuses depends on the places in the line, so that two instances of a kernel that
    # must give the same bytes would differ with nothing broken.
    header = f"-ffp-contract=off -include {quote(ROOT)}/tests/simt/mutant.h"
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        objects = list(pool.map(lambda s: compile_source(f"{into}/{s}", s, header), sources))
    shutil.copy("tests/simt/mutant.cpp", into)
    objects.append(compile_source(f"{into}/mutant.cpp", sources[0], f"-I{quote(ROOT)}/tests/simt -fno-sanitize=thread -x c++"))
    command = command_of("bin/kava_tests").split(" && cd ")[0]
    command = command.replace(" -o bin/kava_tests", f" -o {quote(into)}/tests")
    command = command.replace(" tests/simt/libkava_simt.a", f" {' '.join(map(quote, objects))} tests/simt/libkava_simt.a", 1)
    run(command[:-len(" && :")] if command.endswith(" && :") else command)
    return f"{into}/tests"


# ---- runs

def run_test(program, name, mutant, log="", limit=None):
    """What the test makes of a mutant (passes, skips, fails, hangs) and its seconds of a processor, of which it gets `limit`."""
    pattern = re.sub(r'([\\",\[\]*])', r"\\\1", name)
    test = subprocess.Popen([program, pattern, "-a"], env={**os.environ, "KAVA_MUTANT": str(mutant), "KAVA_MUTANT_LOG": log},
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if limit:
        resource.prlimit(test.pid, resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 1))
        waits = threading.Timer(60 * limit, test.kill)  # for what will not come
        waits.start()
    _, status, usage = os.wait4(test.pid, 0)
    test.returncode = os.waitstatus_to_exitcode(status)
    if limit:
        waits.cancel()
    seconds = usage.ru_utime + usage.ru_stime
    if limit and (seconds >= limit or test.returncode == -signal.SIGKILL):
        return "hangs", seconds
    return {0: "passes", 4: "skips"}.get(test.returncode, "fails"), seconds


def record(program, specification, into):
    """[(test, seconds, numbers of the places where it does what the mutant would do otherwise)], the quickest first."""
    listed = subprocess.run([program, "--filenames-as-tags", "--list-tests", "--verbosity", "quiet", specification], check=True,
                            capture_output=True, text=True).stdout.splitlines()

    def one(i):
        log = f"{into}/log.{i}"
        verdict, seconds = run_test(program, listed[i], -1, log)
        if verdict == "fails":
            raise RuntimeError(f"a test fails where nothing is broken: {listed[i]}")
        return listed[i], seconds, set(map(int, open(log).read().split())) if os.path.exists(log) else set()

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        tests = list(pool.map(one, range(len(listed))))
    return sorted((t for t in tests if t[2]), key=lambda t: t[1])


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("Usage: ")[1].split("\n\n")[0])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--sample", type=int, default=10)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--build", default="build/cpu")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("files", nargs="*")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    kernels = [f for f in sorted(glob.glob("kernels/*.cu") + glob.glob("kernels/*.h")) if os.path.basename(f) not in NO_KERNELS]
    lines = dict.fromkeys(kernels) if not options.files else {f.split(":")[0]: f.partition(":")[2] for f in options.files}
    missing = [f for f in lines if not os.path.isfile(f)]
    if missing:
        sys.exit(f"mutants: {missing[0]}: no such file")
    places = [p for p in places_of(sorted(lines)) if not lines[p.file] or str(p.line) == lines[p.file]]
    if not places:
        sys.exit(f"mutants: there is no place to break in {' '.join(options.files)}")
    with open(REASONS) as file:
        reasons = dict(line.rstrip("\n").split(" -- ", 1) for line in file if line.strip() and not line.startswith("#"))
    unknown = set(reasons) - {p.name for p in places_of(kernels)}
    if unknown:
        sys.exit(f"mutants: {REASONS} names none of: " + "\n".join(sorted(unknown)))
    harmless = [p for p in places if p.name in reasons]
    places = [p for p in places if p.name not in reasons]
    every = [os.path.basename(f)[:-4] for f in sorted(glob.glob("tests/ops/test_*.cpp") + glob.glob("tests/kernels/test_*.cpp"))]
    rounds = [every]
    if not options.all and not options.files:
        draw = random.Random(options.seed)
        drawn = draw.choice(places).file
        places = [p for p in places if p.file == drawn]
        places = sorted(draw.sample(places, min(options.sample, len(places))), key=places.index)
        name = os.path.basename(drawn).split(".")[0]
        short = name.split("_")[0]
        first = ["test_" + t for t in TESTS.get(name, TESTS.get(short, [short, "kernels"]))]
        rounds = [first, [t for t in every if t not in first]]
    if options.list:
        print("\n".join(f"{p.file}:{p.line} {p.rule} {p.nth}: {p.text}" for p in places))
        return 0
    if not places:
        print(f"caught 0/0; harmless by reason {len(harmless)}")
        return 0
    for number, p in enumerate(places, 1):
        p.number = number

    begin = time.monotonic()
    folder = os.path.abspath(options.build)
    into = f"{folder}/mutants"
    program = build(places, folder, into)
    print(f"{len(places)} mutants; built in {time.monotonic() - begin:.0f} s", flush=True)

    def judge(place, tests):
        reaching = [t for t in tests if place.number in t[2]]
        for name, seconds, _ in reaching:
            verdict, _ = run_test(program, name, place.number, limit=max(10, 5 * seconds))
            if verdict in ("fails", "hangs"):
                return "caught", f"{verdict}: {name}"
        return ("survived" if reaching else "not reached"), f"{len(reaching)} tests"

    left = places
    for number, files in enumerate(rounds, 1):
        begin = time.monotonic()
        tests = record(program, ",".join(f"[#{t}]" for t in files), into)
        print(f"{len(tests)} tests recorded in {time.monotonic() - begin:.0f} s", flush=True)
        survivors = []
        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            for place, (verdict, by) in zip(left, pool.map(lambda p: judge(p, tests), left)):
                if verdict != "caught":
                    survivors.append(place)
                    if number < len(rounds):
                        continue
                    verdict = verdict.upper()
                print(f"{verdict:12} {place.file}:{place.line} {place.rule} {place.nth}: {place.text} -- {by}", flush=True)
        left = survivors
        if not left:
            break
    shutil.rmtree(into)
    print(f"caught {len(places) - len(left)}/{len(places)}; harmless by reason {len(harmless)}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())

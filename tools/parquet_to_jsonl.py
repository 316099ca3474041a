#!/usr/bin/env python3
"""Turns Parquet files, in which data hubs keep their sets, and tables of text into one file of JSON lines that kava reads.

  tools/parquet_to_jsonl.py train-00000-of-00001.parquet train.jsonl
  tools/parquet_to_jsonl.py train-*.parquet train.jsonl
  tools/parquet_to_jsonl.py train.csv train.jsonl

Rows keep their order and their columns (docs/formats.md section 1 says which are read), but for a chain that is one text in a column steps:
it stands under cot, or as a list where the text is one. Of .csv and .tsv the first line names the columns;
anything else is Parquet and needs the package pyarrow.
Exit codes: 0 done, 2 usage, 3 pyarrow is missing, 4 a file that is not Parquet or no table, 7 could not write.
"""
import ast
import csv
import io
import json
import os
import re
import sys
import tokenize


def fail(code, text):
    print("error: " + text, file=sys.stderr)
    sys.exit(code)


def plain(value):
    """What JSON has no word for (dates, bytes, decimals) as text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def finite(value):
    """NaN and infinities, which stand for missing numbers in tables, as null."""
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return value


def listed(text):
    """The texts of a list in a cell, as JSON, Python or numpy print it; None of any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)
            tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
            return None
        # numpy puts no comma between two, which Python reads as one text.
        texts = [str(ast.literal_eval(token.string)) for token in tokens if token.type == tokenize.STRING]
        if value == ["".join(texts)] and all(token.string != "," for token in tokens):
            return texts
        if texts != value:
            return None
    return value if isinstance(value, list) and all(isinstance(step, str) for step in value) else None


def readable(row):
    """The row with a chain that is one text under "steps", where kava reads a list alone, as a list or under "cot"."""
    plain_names = {re.sub("[-_ ]", "", name).lower(): name for name in row}
    name = plain_names.get("steps")
    if name is None or not isinstance(row[name], (str, int, float)):
        return row
    text = str(row[name]).strip()
    if text.startswith("["):
        steps = listed(text)
        return row if steps is None else {**row, name: steps}
    rest = {n: value for n, value in row.items() if n != name}
    cot = plain_names.get("cot", "cot")
    if re.fullmatch(r"\d+(\.0*)?", text):  # which counts the steps of a chain elsewhere, and is none
        return rest if row.get(cot) else row
    return {**rest, cot: text} if text or cot not in row else rest


def parquet_rows(path):
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        fail(3, "pyarrow is not installed; python3 -m pip install pyarrow")
    try:
        with open(path, "rb") as source:
            for batch in parquet.ParquetFile(source).iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except OSError as error:
        fail(4, f"{path}: {error.strerror or error}; name a Parquet file")
    except Exception as error:  # pyarrow's own kinds
        fail(4, f"{path}: not a Parquet file: {str(error).splitlines()[0]}; name a Parquet file")


def table_rows(path):
    try:
        with open(path, encoding="utf-8-sig", newline="") as source:
            rows = csv.reader(source, delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True)
            columns = next(rows, [])
            if any(re.fullmatch(r"[-+$]?[\d.,]*\d", cell.strip()) for cell in columns):
                fail(4, f"{path}:1: a cell of the first line is a number; put a line in front that names the columns, as question and answer")
            empty = True
            for row in rows:
                if row and len(row) != len(columns):
                    fail(4, f"{path}:{rows.line_num}: {len(row)} cells, and the first line names {len(columns)} columns; correct the row")
                if row:
                    empty = False
                    yield dict(zip(columns, row))
            if empty:
                fail(4, f"{path}: no row behind the first line, which names the columns; name a table with rows")
    except OSError as error:
        fail(4, f"{path}: {error.strerror or error}; name a table")
    except (UnicodeDecodeError, csv.Error) as error:
        fail(4, f"{path}: no table in UTF-8: {error}; correct the file")


def rows_of(path):
    return table_rows(path) if path.lower().endswith((".csv", ".tsv")) else parquet_rows(path)


def main():
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    if len(arguments) < 2 or any(a.startswith("--") for a in arguments):
        fail(2, "usage: parquet_to_jsonl.py IN... OUT.jsonl; see --help")
    *inputs, out = arguments
    if any(os.path.exists(out) and os.path.exists(i) and os.path.samefile(i, out) for i in inputs):
        fail(2, f"{out}: is one of the inputs; name another file")
    part = f"{out}.part.{os.getpid()}"
    count = 0
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as target:
            for path in inputs:
                for row in rows_of(path):
                    target.write(json.dumps(finite(readable(row)), ensure_ascii=False, allow_nan=False, default=plain) + "\n")
                    count += 1
            target.flush()
            os.fsync(target.fileno())
        os.replace(part, out)
    except OSError as error:
        fail(7, f"{out}: could not write: {error.strerror}; name another file or free some space")
    finally:
        if os.path.exists(part):
            os.unlink(part)
    print(f"{out}: {count} rows")


if __name__ == "__main__":
    main()

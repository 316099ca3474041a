#!/usr/bin/env python3
"""Prints the two tables of engine/text/unicode.cpp: where the Unicode versions inside the Hugging Face `tokenizers` library differ from those
inside PCRE2 10.42 (Unicode 14.0, as Python 3.11's unicodedata) and utf8proc 2.8 (15.0).

usage: python3.11 make_unicode_tables.py, with tokenizers 0.23.3 installed. The library itself is asked; U+11A7 is added by hand.
"""
import unicodedata

from tokenizers import Regex, normalizers, pre_tokenizers

POINTS = [c for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000]
CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co Cn".split()
# Old characters of each category, by length in UTF-8. Not emoji, and of no script that a tokenizer names.
STAND_INS = {
    3: {"Lo": 0xE01, "Lm": 0xA717, "Lu": 0x1E00, "Ll": 0x1E01, "Mn": 0x20D0, "Mc": 0x903, "Nd": 0x966, "So": 0x2195, "Po": 0x2E2E, "Pd": 0x2E3A,
        "Cf": 0x2060, "Sm": 0x2200},
    4: {"Lo": 0x10300, "Lm": 0x16B40, "Lu": 0x10400, "Ll": 0x10428, "Mn": 0x1D167, "Mc": 0x1D165, "Nd": 0x104A0, "No": 0x10107, "So": 0x1D100,
        "Po": 0x10100, "Pd": 0x10EAD, "Sm": 0x1D6C1, "Cf": 0xE0001},
}
IDEOGRAPH = 0x20000


def library_categories():
    """Category of each code point as a split pattern of the library sees it."""
    found = {}
    for category in CATEGORIES:
        split = pre_tokenizers.Split(Regex(r"\p{%s}" % category), "isolated")
        gap = "\x01" if category != "Cc" else "a"
        for i in range(0, len(POINTS), 4096):
            text = gap.join(map(chr, POINTS[i : i + 4096]))
            for piece, (begin, _) in split.pre_tokenize_str(text):
                if len(piece) == 1 and begin % 2 == 0:
                    found.setdefault(ord(piece), category)
    return found


def stand_in(point, category):
    if 0x2EBF0 <= point <= 0x2EE5D or 0x31350 <= point <= 0x323AF:
        return IDEOGRAPH
    return STAND_INS[len(chr(point).encode())][category]


def inert_in_nfc():
    """Marks that the library's NFC does not order. utf8proc's class of a mark is that of a Unicode 15 unicodedata; where Python's is older
    the marks it lacks are asked for as well."""
    nfc = normalizers.NFC().normalize_str
    inert = [0x11930, 0x11A7]
    for point in POINTS:
        mark = chr(point)
        if point < 0x300 or nfc(mark) != mark or not (unicodedata.combining(mark) or 0x10EFD <= point <= 0x10EFF or point in YOUNG_MARKS):
            continue
        other = "\u0301" if unicodedata.combining(mark) == 1 else "\u0334"
        if nfc("\u2060" + mark + other) == "\u2060" + mark + other and nfc("\u2060" + other + mark) == "\u2060" + other + mark:
            inert.append(point)
    return sorted(inert)


# Marks of Unicode 15.0 with a combining class.
YOUNG_MARKS = {0x11F41, 0x11F42, 0x1E08F, 0x1E4EC, 0x1E4ED, 0x1E4EE, 0x1E4EF}


def print_ranges(rows):
    """rows: (point, value or None), sorted."""
    ranges = []
    for point, value in rows:
        if ranges and ranges[-1][1] == point - 1 and ranges[-1][2] == value:
            ranges[-1][1] = point
        else:
            ranges.append([point, point, value])
    for first, last, value in ranges:
        print(f"{{0x{first:X}, 0x{last:X}" + (f", 0x{value:X}" if value is not None else "") + "},")
    print()


def main():
    library = library_categories()
    rows = [(c, stand_in(c, g)) for c, g in library.items() if g != unicodedata.category(chr(c))] + [(0x180E, 0x2060)]
    print_ranges(sorted(rows))
    print_ranges([(c, None) for c in inert_in_nfc()])


if __name__ == "__main__":
    assert unicodedata.unidata_version.startswith("14."), "needs a Python whose unicodedata is of Unicode 14"
    main()

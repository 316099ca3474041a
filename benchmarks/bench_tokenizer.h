// Speed of the tokenizer on one core: loading, encoding row by row, decoding.
#pragma once
#include <cstdio>
#include <string>

namespace kava {

/// Writes one line to `out`: load time, MB/s of text encoded and decoded, tokens per byte. folder: a Hugging Face folder with
/// tokenizer.json. file: whose lines are encoded one by one, at least once and for about a second; Error(code data) where it has none.
void bench_tokenizer(std::FILE* out, const std::string& folder, const std::string& file);

}  // namespace kava

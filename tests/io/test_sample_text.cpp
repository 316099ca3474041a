// How the text of a row becomes ids: affixes, separators, and the lengths of steps, by each method's keys.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "engine/data/data.h"
#include "engine/error.h"
#include "engine/text/tokenizer.h"
#include "models/text.h"
#include "tests/folders.h"

using namespace kava;
using Ids = std::vector<int32_t>;

namespace {

RowFile file_of(const std::string& text) {
  const TempFolder folder;
  overwrite(folder / "rows", text);
  return read_rows(folder / "rows");
}

SampleOptions options_of(const std::string& toml) {
  const TempFolder folder;
  overwrite(folder / "run.toml", toml);
  return sample_options(load_config(folder / "run.toml"), 128009, 128256);
}

std::vector<Sample> samples_of(const std::string& method, const std::string& rows, LeftOut* left_out = nullptr) {
  static const Tokenizer tokenizer = Tokenizer::load(shared_data("data") + "/tokenizers/llama-3.2-1b-instruct");
  LeftOut counted;
  const std::vector<Sample> samples = make_samples({file_of(rows)}, &tokenizer, options_of("method = '" + method + "'"), &counted);
  if (left_out) *left_out = counted;
  return samples;
}

const char* const kRow = "How many?||<<3*10=30>> <<30+5=35>> #### 35";

}  // namespace

TEST_CASE("coconut's newlines are tokenised with what they follow") {
  if (shared_data("data").empty()) SKIP("no shared data beside the sources, and KAVA_SHARED is not set");
  const Sample s = samples_of("coconut", kRow).at(0);
  CHECK(s.question == Ids{128000, 4438, 1690, 5380});
  CHECK(s.trace == Ids{2501, 18, 9, 605, 28, 966, 40171, 2501, 966, 10, 20, 28, 1758, 40171});
  CHECK(s.steps == Ids{7, 7});
  CHECK(s.answer == Ids{14711, 220, 1758, 128009});
  CHECK(s.prompt == 1);
}

TEST_CASE("icot's blanks stand around every part, and separators end the question and the trace") {
  if (shared_data("data").empty()) SKIP("no shared data beside the sources, and KAVA_SHARED is not set");
  const Sample s = samples_of("icot", kRow).at(0);
  CHECK(s.question == Ids{128000, 2650, 1690, 30, 220, 128009});
  CHECK(s.trace == Ids{1134, 18, 9, 605, 28, 966, 2511, 1134, 966, 10, 20, 28, 1758, 2511, 220});
  CHECK(s.answer == Ids{128009, 27370, 220, 1758, 220, 128009});
  CHECK(s.prompt == 2);
  const std::vector<Sample> more = samples_of("icot", "a||#### 1,234\nb||s #### 1234");
  CHECK(more[0].trace.empty());
  CHECK(more[0].steps.empty());
  CHECK(more[0].answer == more[1].answer);
}

TEST_CASE("codi_exact distils at the lone blank, and drops answers that begin with no digit") {
  if (shared_data("data").empty()) SKIP("no shared data beside the sources, and KAVA_SHARED is not set");
  LeftOut left_out;
  const std::vector<Sample> samples = samples_of("codi_exact", std::string(kRow) + "\nq||s #### -5\nq||s #### .5\nq||s #### $5", &left_out);
  REQUIRE(samples.size() == 1);
  CHECK(left_out.by_answer == 3);
  CHECK(left_out.too_long == 0);
  const Sample& s = samples[0];
  CHECK(s.answer == Ids{791, 4320, 374, 25, 220, 1758, 128009});
  CHECK((s.prompt == 4 && s.blank == 1));
  CHECK(s.steps.size() == 1);
  CHECK(samples_of("kava", kRow).at(0).blank == 0);
}

TEST_CASE("the trace of an ids row may be a list for each step") {
  const RowFile file = file_of(
      "{\"question\": [1], \"trace\": [[3, 4], [], [5]], \"answer\": [6, 7]}\n{\"question\": [1], \"trace\": [3, 4], \"answer\": [6]}\n"
      "{\"question\": [1], \"trace\": [], \"answer\": [6]}");
  LeftOut left_out;
  SampleOptions options = options_of("method = 'coconut'");
  const std::vector<Sample> samples = make_samples({file}, nullptr, options, &left_out);
  CHECK(samples[0].trace == Ids{3, 4, 5});
  CHECK(samples[0].steps == Ids{2, 1});
  CHECK(samples[1].steps == Ids{2});
  CHECK(samples[2].steps.empty());
  CHECK_THROWS_AS(file_of("{\"question\": [1], \"trace\": [[3], 4], \"answer\": [6]}"), Error);
  CHECK_THROWS_AS(file_of("{\"question\": [1], \"trace\": [3, [4]], \"answer\": [6]}"), Error);
}

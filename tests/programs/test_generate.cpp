// kava_generate, kava_inspect tokens, and models that no memory holds.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cstring>
#include <set>

#include "models/weights.h"
#include "tests/programs/text_run.h"

using namespace kava;
namespace fs = std::filesystem;
using Catch::Matchers::ContainsSubstring;

TEST_CASE("a question that begins as a home folder does is asked as it is") {
  TextRun tiny;
  const std::string dir = tiny.dir.string();
  tiny.write("line", "~/x\n");
  const Ended alone = run_command("kava_generate '" + dir + "' '~/x' --max-new-tokens 4 --latents");
  CHECK(alone.code == 0);
  CHECK(alone.out == run_command("kava_generate '" + dir + "' --file '" + (tiny.folder / "line") + "' --max-new-tokens 4 --latents").out);
  CHECK(alone.out != run_command("kava_generate '" + dir + "' \"$HOME/x\" --max-new-tokens 4 --latents").out);
}

TEST_CASE("a dialogue with kava_generate takes commands, and answers as single questions are answered") {
  TextRun tiny;
  const std::string dir = tiny.dir.string(), question = "What is 2+2?";
  const auto alone = [&](const std::string& more) {
    const Ended e = run_command("kava_generate " + dir + " '" + question + "' --max-new-tokens 8" + more);
    REQUIRE(e.code == 0);
    return e.out;
  };
  tiny.write("lines", question + "\n/stats\n/cot\n" + question + "\n/cot\n" + question + "\n/method no_cot\n" + question +
                          "\n/method kava\n/latents\n" + question + "\n/quit\n" + question + "\n");
  const Ended talk = run_command("kava_generate " + dir + " --max-new-tokens 8 < " + (tiny.folder / "lines"));
  CAPTURE(talk.err);
  REQUIRE(talk.code == 0);
  CHECK(talk.out == alone("") + alone(" --method full_cot") + alone("") + alone(" --method no_cot") + alone(" --latents"));
  CHECK_THAT(talk.err, ContainsSubstring("1 answers; each on average: ") && ContainsSubstring("forward passes") &&
                           ContainsSubstring("method full_cot") && ContainsSubstring("latents are shown"));
  // What is no command is no question, and nothing behind it is answered.
  for (const auto& [line, about] : {std::pair("/latent", "error: /latent: is no command; see /help; a question that begins with /"),
                                    std::pair("/quit now", "error: /quit: is no command"),
                                    std::pair("/method", "error: /method: its method is missing; give one of full_cot, "),
                                    std::pair("/method foo", "error: /method: \"foo\" is none of its values")}) {
    tiny.write("lines", question + "\n" + line + "\n" + question + "\n");
    const Ended e = run_command("kava_generate " + dir + " --max-new-tokens 8 < " + (tiny.folder / "lines"));
    CAPTURE(line, e.err);
    CHECK(e.code == 2);
    CHECK(e.out == alone(""));
    CHECK(e.err.starts_with(about));
    CHECK(std::count(e.err.begin(), e.err.end(), '\n') == 1);
  }
  CHECK(run("kava_generate " + dir + " --file " + tiny.write("slash", "/latent\n")).code == 0);
  CHECK_THAT(alone(" --latents"), ContainsSubstring("of the distance that random values of the same size have"));
}

TEST_CASE("a stop signal ends a file of questions behind a batch, with 75 and the answers so far") {
  TextRun tiny;
  std::string lines;
  for (int i = 0; i < 1000; ++i) lines += fmt::format("What is {}+{}?\n", i, i);
  const std::string file = tiny.write("questions.txt", lines), out = tiny.folder / "out";
  overwrite(out, "");
  const Ended stopped =
      run_command(fmt::format("kava_generate '{}' --file '{}' --max-new-tokens 30 --threads 1 >'{}' & until [ -s '{}' ]; do sleep 0.01; "
                              "done; kill -USR1 $!; wait $!",
                              tiny.dir.string(), file, out, out));
  INFO(stopped.err);
  CHECK(stopped.code == 75);
  const std::string answers = read_file(out, 1 << 24);
  const auto n = std::count(answers.begin(), answers.end(), '\n');
  CHECK((n > 0 && n < 1000 && n % kDecodeBatch == 0));
  CHECK(stopped.err == fmt::format("error: kava_generate: stopped after {} of 1000 answers; the questions that follow are left\n", n));
}

TEST_CASE("weights that no memory holds are refused before they are read, and weights of another shape before that") {
  TextRun tiny;
  const fs::path base = tiny.folder.path() / "base";
  Json config = read_json((base / "config.json").string());
  config["vocab_size"] = (int64_t{1} << 31) - 1, config["hidden_size"] = 128, config["tie_word_embeddings"] = true;
  overwrite(base / "config.json", config.dump());
  Json header = Json::object();
  uint64_t bytes = 0;
  for (const WeightSpec& w : weight_specs(ModelConfig::load(base.string()))) {
    const uint64_t size = static_cast<uint64_t>(w.rows * w.cols * 2);
    header[w.name] = {{"dtype", "BF16"}, {"shape", w.file_shape()}, {"data_offsets", {bytes, bytes + size}}};
    bytes += size;
  }
  const std::string text = header.dump(), file = (base / "model.safetensors").string();
  const uint64_t length = text.size();
  overwrite(file, std::string(reinterpret_cast<const char*>(&length), 8) + text);
  fs::resize_file(file, 8 + length + bytes);  // a hole: nothing on the disk
  const std::string ask = "kava_generate " + base.string() + " A --dtype f64";
  const Finished huge = run(ask);
  CHECK(huge.code == 3);
  CHECK(huge.output.starts_with("error: memory: the weights take "));
  config["hidden_size"] = 64;
  overwrite(base / "config.json", config.dump());
  const Finished other = run(ask);
  CHECK(other.code == 4);
  CHECK_THAT(other.output, ContainsSubstring("config.json asks for"));
}

TEST_CASE("memory that runs out anywhere is exit 3") {
#if defined(KAVA_ASAN) || defined(KAVA_TSAN)
  SKIP("a sanitizer's own memory does not fit into a limited address space");
#else
  TextRun tiny;
  std::set<int> codes;
  for (int kilobytes = 110'000; kilobytes <= 400'000; kilobytes += kilobytes / 20) {
    const Finished f = run(fmt::format("kava_inspect --version > /dev/null; ulimit -v {}; {}/kava_generate {} A --threads 1", kilobytes,
                                       bin_dir(), tiny.dir.string()));
    CAPTURE(kilobytes, f.output);
    CHECK((f.code == 0 || (f.code == 3 && f.output.starts_with("error: memory: "))));
    codes.insert(f.code);
  }
  CHECK(codes == std::set<int>{0, 3});
#endif
}

TEST_CASE("kava_generate answers a question, a file and lines of standard input alike") {
  TextRun tiny;
  const std::string dir = tiny.dir.string(), file = tiny.write("questions.txt", "\xEF\xBB\xBFWhat is 2+2?\r\nHow many?\n");
  const Finished one = run("kava_generate " + dir + " 'What is 2+2?' 2>/dev/null"), all = run("kava_generate " + dir + " --file " + file);
  CHECK(one.code == 0);
  CHECK(all.code == 0);
  CHECK(std::count(all.output.begin(), all.output.end(), '\n') == 2);
  CHECK(all.output.starts_with(one.output));
  CHECK(run("kava_generate " + dir + " 2>/dev/null < " + tiny.write("typed.txt", "What is 2+2?\n/quit\nHow many?\n")).output == one.output);
  const Finished latents = run("kava_generate " + dir + " 'What is 2+2?' --latents 2>/dev/null");
  CHECK(latents.output.ends_with(one.output));
  CHECK(std::count(latents.output.begin(), latents.output.end(), '\n') == 7);
  CHECK(run("kava_generate " + dir + " < " + file).output == all.output);
  CHECK(run("kava_generate " + dir + " < " + file + " 2>&1 > /dev/full").output.starts_with("error: standard output: "));
  CHECK(run("kava_generate " + dir + " 'A' --file " + file).code == 2);
  CHECK(run("kava_generate " + dir + " ' '").code == 2);
  CHECK(run("kava_generate '' A").output.starts_with("error: MODEL: is empty; "));
  CHECK_THAT(run("kava_generate " + dir + " --file " + tiny.write("long.txt", "A\n" + std::string(2 << 20, 'a'))).output,
             ContainsSubstring("long.txt:2"));
  CHECK(run("kava_generate " + dir + " < " + dir).output.starts_with("error: standard input: could not read; "));
  CHECK(run("kava_generate " + dir + " 'A' --latents --method no_cot").code == 2);
  CHECK(run("kava_generate " + dir + " --file " + tiny.write("broken.txt", "fine\n\xff\n")).code == 4);
  CHECK_THAT(run("kava_generate " + dir + " --file " + (tiny.folder / "broken.txt")).output, ContainsSubstring("broken.txt:2"));
  CHECK_THAT(run("kava_generate " + dir + " --file " + tiny.write("empty.txt", "")).output, ContainsSubstring("holds no question"));
  CHECK(run("kava_generate " + dir + " --file " + tiny.write("last.txt", "What is 2+2?\nHow many?")).output == all.output);
  CHECK(run("kava_generate " + dir + " --file " + tiny.write("behind.txt", "What is 2+2?\nHow many?\n\n \n")).output == all.output);
  // An answer stands on its question's line: a line without a question is refused before there is any, of standard input when it comes.
  for (const char* blank : {"\n", " \t\r\n"}) {
    const std::string lines = tiny.write("blank.txt", "What is 2+2?\n" + std::string(blank) + "How many?\n");
    const Ended read = run_command("kava_generate " + dir + " --file " + lines),
                typed = run_command("kava_generate " + dir + " < " + lines);
    CHECK(read.code == 4);
    CHECK(read.out.empty());
    CHECK_THAT(read.err, ContainsSubstring("blank.txt:2: the line is empty, but every line is a question; "));
    CHECK(typed.code == 4);
    CHECK(typed.out == one.output);
    CHECK_THAT(typed.err, ContainsSubstring("error: stdin:2: the line is empty"));
  }
}

TEST_CASE("an answer without a word is told of, with the chat that a plain model may want") {
  TextRun tiny;
  RunConfig config = tiny.config;
  config.method = Method::full_cot, config.train.trainable = Trainable::all;
  const fs::path base = tiny.folder.path() / "plain";
  {
    const auto ops = make_cpu_ops(1);
    const Model model(*ops, config, ModelConfig::load(config.model.path));
    save_adapter(model, base.string());
  }
  // Weights of zero take the first token, which here ends the answer.
  std::string weights = read_file((base / "model.safetensors").string(), 1 << 24);
  uint64_t header = 0;
  std::memcpy(&header, weights.data(), sizeof header);
  std::fill(weights.begin() + static_cast<int64_t>(sizeof header + header), weights.end(), '\0');
  overwrite(base / "model.safetensors", weights);
  overwrite(base / "tokenizer_config.json", R"({"eos_token": "!"})");
  const std::string file = tiny.write("questions.txt", "What is 2+2?\nHow many?\n");
  const Finished one = run("kava_generate " + base.string() + " 'What is 2+2?'"),
                 all = run("kava_generate " + base.string() + " --file " + file);
  CHECK_THAT(one.output, ContainsSubstring("the answer is empty: a model that was trained on chats is asked in their form by --chat auto"));
  CHECK_THAT(all.output, ContainsSubstring("2 of 2 answers are empty: a model"));
  CHECK((one.code == 0 && all.code == 0));
}

TEST_CASE("kava_inspect tokens encodes lines and decodes them back") {
  TextRun tiny;
  const std::string base = (tiny.folder.path() / "base").string();
  auto tokens = [&](const std::string& options, const std::string& input) {
    return run("kava_inspect tokens " + base + options + " < " + tiny.write("input.txt", input));
  };
  CHECK(tokens("", "!\"<end>\n\n# #").output == "0 1 95\n\n2 94 2\n");
  CHECK(tokens(" --json", "\"!\\u0020!\"\n").output == "0 94 0\n");
  CHECK(tokens(" --decode", "0 1 95\n\n2  94 2\n").output == "!\"<end>\n\n# #\n");
  CHECK(tokens(" --decode --json", "0 1\n").output == "\"!\\\"\"\n");
  CHECK(run("kava_inspect tokens " + tiny.dir.string() + " < " + tiny.write("input.txt", "!\n")).output == "0\n");
  const std::pair<std::string, std::string> broken[] = {
      {"", "!\n\xff\n"},        {" --json", "\"!\"\n!\n"}, {" --json", "\"!\"\n4\n"},        {" --decode", "0\n1 x\n"},
      {" --decode", "0\n96\n"}, {" --decode", "0\n-1\n"},  {" --decode", "0\n99999999999\n"}};
  for (const auto& [options, input] : broken) {
    const Finished f = tokens(options, input);
    CAPTURE(options, input, f.output);
    CHECK(f.code == 4);
    CHECK_THAT(f.output, ContainsSubstring("error: stdin:2: "));
  }
  CHECK(run("kava_inspect tokens " + base + " > /dev/full < " + tiny.write("input.txt", "!\n")).code == 7);
  CHECK(run("kava_inspect tokens " + base + " < " + base).code == 4);
  CHECK(run("kava_inspect tokens " + base + " < /dev/zero").output.starts_with("error: standard input: a line is longer"));
  CHECK(run("kava_inspect --version > /dev/null; yes | timeout 60 " + bin_dir() + "/kava_inspect tokens " + base + " 2>&1 > /dev/full")
            .code == 7);
}

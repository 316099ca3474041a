// kava_generate: answers a question, a file of questions, or a dialogue on the terminal.
#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <optional>

#include "engine/files/files.h"
#include "models/evaluate.h"
#include "models/latent_tokens.h"
#include "tools/command.h"
#include "tools/model_options.h"

namespace {

using namespace kava;

constexpr std::size_t kLargestFile = std::size_t{1} << 30;
constexpr std::size_t kLongestQuestion = std::size_t{1} << 20;

struct GenerateCommand {
  ModelOptions model;
  std::string question;
  std::optional<std::string> file;
  bool latents = false;
};

struct Question {
  std::string where, text;
};

// One line of output for each answer.
std::string one_line(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '\n') out += "\\n";
    else if (c == '\r') out += "\\r";
    else out += c;
  }
  return out;
}

class Generator {
 public:
  Generator(const GenerateCommand& command, const ChosenModel& chosen)
      : tokenizer_(*chosen.opened.text.tokenizer),
        chat_(chosen.opened.text.chat),
        model_(load_model(*chosen.ops, chosen.opened)),
        arena_(*chosen.ops),
        decoding_(decoding_of(chosen.opened.config, chosen.choice)),
        config_(decoding_.config),
        recipe_(decoding_.recipe) {
    static_cast<DecodeChoice&>(options_) = chosen.choice;
    options_.eos = *chosen.opened.text.eos;
    options_.max_new_tokens = command.model.max_new_tokens > 0 ? command.model.max_new_tokens : default_new_tokens(config_, recipe_, 0);
    options_.keep_latents = command.latents;
    if (command.latents && recipe_.latents == 0)
      throw Error(Exit::usage, "--latents", "method " + name_of(config_.method) + " has no latents", "give a run trained with latents");
  }

  std::vector<DecodeResult> answer(const std::vector<Question>& questions) {
    std::vector<Sample> samples;
    for (const Question& q : questions) samples.push_back(sample_of(q));
    return decode(*model_, arena_, samples, options_);
  }

  std::string text(const DecodeResult& r) const { return std::string(stripped(tokenizer_.decode(r.ids, true))); }

  void print_latents(const DecodeResult& r) {
    if (!options_.keep_latents) return;
    const std::vector<NearestToken> nearest = nearest_tokens(*model_, arena_, r.latents.values, tokenizer_.size(), r.latents.positions);
    fmt::print("{:>6}  {:<24}{:>9}  {}\n", "latent", "nearest value", "distance", "head's top token");
    for (std::size_t i = 0; i < nearest.size(); ++i)
      fmt::print("{:>6}  {:<24}{:>9.3f}  {}\n", i, shown(nearest[i].id), nearest[i].distance, shown(r.latents.top[i]));
  }

 private:
  std::string shown(int32_t id) const { return fmt::format("\"{}\"", escaped(tokenizer_.token(id), 40)); }

  Sample sample_of(const Question& q) const {
    if (!is_utf8(q.text)) throw Error(Exit::data, q.where, "broken UTF-8", "give the question in UTF-8");
    if (q.text.size() > kLongestQuestion)
      throw Error(Exit::data, q.where, fmt::format("the question has {} bytes", q.text.size()),
                  fmt::format("shorten it: at most {}", kLongestQuestion));
    SampleOptions options = sample_options(config_, options_.eos, tokenizer_.size());
    options.chat_before = chat_.before, options.chat_after = chat_.after;
    Sample s;
    s.question = question_ids(tokenizer_, options, stripped(q.text));
    s.answer = prompt_ids(tokenizer_, options);
    s.prompt = static_cast<int32_t>(s.answer.size());
    if (s.question.empty())
      throw Error(Exit::data, q.where, "the question has no token of the model's vocabulary", "give another question");
    if (prompt_length(recipe_, s) > longest_prompt(model_->shape))
      throw Error(Exit::data, q.where, fmt::format("the question has {} tokens", s.question.size()),
                  fmt::format("shorten it: at most {} in all", longest_prompt(model_->shape)));
    return s;
  }

  const Tokenizer& tokenizer_;
  const ChatForm& chat_;
  std::unique_ptr<Model> model_;
  Arena arena_;
  const Decoding decoding_;
  const RunConfig& config_;
  const Recipe& recipe_;
  DecodeOptions options_;
};

// One question a line; a BOM and blank lines are passed over.
std::vector<Question> read_questions(const std::string& path) {
  std::string text = read_file(path, kLargestFile);
  if (text.starts_with("\xEF\xBB\xBF")) text.erase(0, 3);
  std::vector<Question> questions;
  int64_t line = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    ++line;
    if (std::string q(stripped(std::string_view(text).substr(at, end - at))); !q.empty())
      questions.push_back({fmt::format("{}:{}", escaped(path, 4096), line), std::move(q)});
    at = end + 1;
  }
  if (questions.empty()) throw Error(Exit::data, escaped(path, 4096), "holds no question", "write one question a line");
  return questions;
}

void answer_file(Generator& generator, const std::vector<Question>& questions) {
  for (std::size_t first = 0; first < questions.size(); first += kDecodeBatch) {
    const std::size_t end = std::min(questions.size(), first + kDecodeBatch);
    const std::vector<Question> some(questions.begin() + static_cast<int64_t>(first), questions.begin() + static_cast<int64_t>(end));
    for (const DecodeResult& r : generator.answer(some)) {
      generator.print_latents(r);
      fmt::print("{}\n", one_line(generator.text(r)));
    }
    require_printed();
  }
}

// `tell` whether a person reads the diagnostics.
void answer_one(Generator& generator, const Question& question, bool tell) {
  const DecodeResult r = generator.answer({question})[0];
  generator.print_latents(r);
  fmt::print("{}\n", generator.text(r));
  if (tell && r.hit_limit) fmt::print(stderr, "stopped at the largest number of new tokens; raise --max-new-tokens for more\n");
  require_printed();
}

void dialogue(Generator& generator) {
  const bool terminal = ::isatty(STDIN_FILENO);
  if (terminal) fmt::print(stderr, "Ask a question; /help tells more, /quit or end of input ends.\n");
  std::string line;
  for (int64_t n = 1;; ++n) {
    if (terminal) fmt::print(stderr, "> ");
    if (!next_line(line)) break;
    const std::string text(stripped(line));
    if (text == "/quit") return;
    if (text == "/help") fmt::print(stderr, "One question a line; each is answered on its own.\n/help  this text\n/quit  end\n");
    if (text.empty() || text == "/help") continue;
    try {
      answer_one(generator, {fmt::format("stdin:{}", n), text}, terminal);
    } catch (const Error& e) {
      if (!terminal || e.code() != Exit::data) throw;
      fmt::print(stderr, "{}\n", e.what());
    }
  }
  if (terminal) fmt::print(stderr, "\n");
}

int generate(const GenerateCommand& command, bool has_question) {
  if (has_question && command.file) throw Error(Exit::usage, "--file", "is given beside a question", "give one of them");
  if (has_question && stripped(command.question).empty()) throw Error(Exit::usage, "QUESTION", "is empty", "give a question");
  const ChosenModel chosen = choose_model(command.model);
  if (!chosen.opened.text.tokenizer)
    Tokenizer::refuse_missing(chosen.opened.text.folder, "no question can be read", "use kava_eval on rows of ids");
  const std::vector<Question> questions = command.file ? read_questions(*command.file) : std::vector<Question>{};
  Generator generator(command, chosen);
  if (!questions.empty()) answer_file(generator, questions);
  else if (has_question) answer_one(generator, {"QUESTION", std::string(stripped(command.question))}, true);
  else dialogue(generator);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Answers a question, a file of questions, or a dialogue on the terminal", "kava_generate");
  app.footer(
      "Example:\n  kava_generate runs/quickstart/kava \\\n"
      "    \"Tom has 4 coins. Mia has 3 more than Tom. How many coins does Mia have modulo 10?\" --latents");
  GenerateCommand command;
  kava::add_model_options(app, command.model)->required();
  CLI::Option* question =
      app.add_option("QUESTION", command.question, "The question; without it and --file, questions are read from the terminal");
  app.add_option("--file", command.file, "A text file with one question a line; one answer a line comes out");
  app.add_flag("--latents", command.latents,
               "Show each latent of the last pass as the token with the nearest first-layer value, and the head's top token");
  return kava::command_main(argc, argv, app, [&] { return generate(command, question->count() > 0); });
}

// kava_generate: answers a question, a file of questions, or a dialogue on the terminal.
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <optional>

#include "engine/cli.h"
#include "engine/files/files.h"
#include "engine/rng.h"
#include "models/decode_ranks.h"
#include "models/evaluate.h"
#include "models/latent_tokens.h"
#include "tools/choice_option.h"
#include "tools/command.h"
#include "tools/line_editor.h"
#include "tools/model_options.h"
#include "tools/ranks.h"

namespace {

using namespace kava;

constexpr std::size_t kLargestFile = std::size_t{1} << 30;
constexpr std::size_t kLongestQuestion = std::size_t{1} << 20;

struct GenerateCommand {
  ModelOptions model;
  RankOptions ranks;
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

// Normal numbers, row by row as large as the values.
std::vector<float> random_of_equal_norms(std::span<const float> values, std::size_t rows) {
  std::vector<float> out(values.size());
  const std::size_t width = values.size() / rows;
  for (std::size_t r = 0; r < rows; ++r) {
    double square = 0, drawn = 0;
    for (std::size_t i = 0; i < width; ++i) {
      const auto words = philox({static_cast<uint32_t>(r), static_cast<uint32_t>(i), 0, 0}, philox_key(Purpose::sampling, 0));
      const float x = static_cast<float>(normal_pair(words[0], words[1])[0]), v = values[r * width + i];
      out[r * width + i] = x;
      square += double(v) * v, drawn += double(x) * x;
    }
    for (std::size_t i = 0; i < width; ++i) out[r * width + i] *= static_cast<float>(std::sqrt(square / drawn));
  }
  return out;
}

class Generator {
 public:
  Generator(const GenerateCommand& command, const ChosenModel& chosen, Comm& comm)
      : comm_(comm),
        tokenizer_(*chosen.opened.text.tokenizer),
        chat_(chosen.opened.text.chat),
        opened_(chosen.opened),
        model_(load_model(*chosen.ops, chosen.opened)),
        arena_(*chosen.ops),
        max_new_tokens_(command.model.max_new_tokens) {
    options_.eos = *chosen.opened.text.eos;
    choose(chosen.choice);
    if (command.latents) show_latents("--latents");
  }

  /// Error(code usage) for a method that the weights cannot do.
  void choose(const DecodeChoice& choice) {
    require_method(opened_, choice.method);
    decoding_ = decoding_of(opened_.config, choice);
    static_cast<DecodeChoice&>(options_) = choice;
    options_.max_new_tokens = max_new_tokens_ > 0 ? max_new_tokens_ : default_new_tokens(config_, recipe_, 0);
    options_.keep_latents = options_.keep_latents && recipe_.latents > 0;
  }
  bool leads() const { return comm_.leads(); }
  const DecodeChoice& choice() const { return options_; }
  Method method() const { return config_.method; }

  void show_latents(const char* asked_by) {
    if (recipe_.latents == 0) refuse_without_latents(asked_by, config_.method, recipe_);
    options_.keep_latents = true;
  }
  void hide_latents() { options_.keep_latents = false; }
  bool shows_latents() const { return options_.keep_latents; }

  const std::string& base_digest() const { return model_->base_digest; }

  /// What a question is to the model. Error(code data) where it cannot be decoded.
  Sample read(const Question& q) const {
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

  /// Each rank answers a part, and all get all answers. told: of the answer's text so far, after every token; one question, of one rank.
  std::vector<DecodeResult> answer(const std::vector<Question>& questions, const std::function<void(const std::string&)>& told = {}) {
    std::vector<Sample> samples;
    for (const Question& q : questions) samples.push_back(read(q));
    DecodeOptions options = options_;
    std::vector<int32_t> ids;
    if (told && comm_.alone())
      options.on_token = [&](std::size_t, int32_t id) {
        ids.push_back(id);
        told(text(ids));
      };
    return decode_on_ranks(comm_, *model_, arena_, samples, options);
  }

  std::string text(std::span<const int32_t> ids) const { return std::string(stripped(tokenizer_.decode(ids, true))); }

  /// What may help a model that has nothing to say to a bare question.
  std::string chat_hint() const {
    return chat_.family == ChatFamily::none && opened_.plain()
               ? ": a model that was trained on chats is asked in their form by --chat auto, llama3 or chatml"
               : "";
  }

  void print_latents(const DecodeResult& r) {
    if (!options_.keep_latents || !comm_.leads()) return;
    const std::vector<NearestToken> nearest = nearest_tokens(*model_, arena_, r.latents.values, tokenizer_.size(), r.latents.positions);
    fmt::print("{:>6}  {:<24}{:>9}  {}\n", "latent", "nearest value", "distance", "head's top token");
    for (std::size_t i = 0; i < nearest.size(); ++i)
      fmt::print("{:>6}  {:<24}{:>9.3f}  {}\n", i, shown(nearest[i].id), nearest[i].distance, shown(r.latents.top[i]));
    print_meaning(r, nearest);
  }

 private:
  // What the distances are worth: random values of the same size have a nearest row as well.
  void print_meaning(const DecodeResult& r, const std::vector<NearestToken>& nearest) {
    const std::vector<float> random = random_of_equal_norms(r.latents.values, nearest.size());
    double latents = 0, randoms = 0;
    for (const NearestToken& n : nearest) latents += n.distance;
    for (const NearestToken& n : nearest_tokens(*model_, arena_, random, tokenizer_.size(), r.latents.positions)) randoms += n.distance;
    constexpr double kNoNearer = 0.9;
    fmt::print("The nearest rows are at {:.2f} of the distance that random values of the same size have{}.\n", latents / randoms,
               latents > kNoNearer * randoms ? ": the words above mean nothing" : "");
  }

  std::string shown(int32_t id) const { return fmt::format("\"{}\"", escaped(tokenizer_.token(id), 40)); }

  Comm& comm_;
  const Tokenizer& tokenizer_;
  const ChatForm& chat_;
  const OpenedModel& opened_;
  std::unique_ptr<Model> model_;
  Arena arena_;
  const int64_t max_new_tokens_;  // 0: the method's default
  Decoding decoding_;
  const RunConfig& config_ = decoding_.config;
  const Recipe& recipe_ = decoding_.recipe;
  DecodeOptions options_;
};

[[noreturn]] void refuse_empty(const std::string& where) {
  throw Error(Exit::data, where, "the line is empty, but every line is a question", "write the question, or take the line out");
}

// One question a line, so that answers stand beside their questions by number; a BOM is passed over, and
// empty lines behind the last question. Error(code data) for one before a question.
std::vector<Question> read_questions(const std::string& path) {
  std::string text = read_file(path, kLargestFile);
  if (text.starts_with("\xEF\xBB\xBF")) text.erase(0, 3);
  std::vector<Question> questions;
  std::string empty;  // the first of the empty lines before this one
  int64_t line = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    ++line;
    Question q = {fmt::format("{}:{}", shown_path(path), line), std::string(stripped(std::string_view(text).substr(at, end - at)))};
    at = end + 1;
    if (q.text.empty()) {
      if (empty.empty()) empty = q.where;
      continue;
    }
    if (!empty.empty()) refuse_empty(empty);
    questions.push_back(std::move(q));
  }
  if (questions.empty()) throw Error(Exit::data, shown_path(path), "holds no question", "write one question a line");
  return questions;
}

// A batch on each rank at a time. Error(code stopped), on every rank, where a signal has asked any for it meanwhile.
void answer_file(Generator& generator, const std::vector<Question>& questions, Comm& comm) {
  const auto batch = static_cast<std::size_t>(kDecodeBatch * comm.size());
  std::size_t empty = 0;
  for (std::size_t first = 0; first < questions.size(); first += batch) {
    if (comm.any(stop_requested(), "asking for a stop"))
      together(comm, "stopping", [&] {
        if (comm.leads())
          throw Error(Exit::stopped, "kava_generate", fmt::format("stopped after {} of {} answers", first, questions.size()),
                      "the questions that follow are left");
      });
    const std::size_t end = std::min(questions.size(), first + batch);
    const std::vector<Question> some(questions.begin() + static_cast<int64_t>(first), questions.begin() + static_cast<int64_t>(end));
    for (const DecodeResult& r : generator.answer(some)) {
      generator.print_latents(r);
      const std::string text = one_line(generator.text(r.ids));
      empty += text.empty() ? 1 : 0;
      fmt::print("{}\n", text);
    }
    require_printed();
  }
  if (empty > 0 && generator.leads())
    print_note(fmt::format("{} of {} answers are empty{}", empty, questions.size(), generator.chat_hint()));
}

// Prints an answer while it is written: what is sure to stay, without white space at its end and bytes of an unfinished character.
class Stream {
 public:
  void operator()(const std::string& text) {
    std::string_view sure = text;
    while (sure.ends_with("\xEF\xBF\xBD")) sure.remove_suffix(3);
    if (sure.size() <= printed_) return;
    fmt::print("{}", sure.substr(printed_));
    std::fflush(stdout);
    printed_ = sure.size();
  }
  void end(const std::string& text) const { fmt::print("{}\n", std::string_view(text).substr(std::min(printed_, text.size()))); }

 private:
  std::size_t printed_ = 0;
};

// Of the answers of a dialogue.
struct Stats {
  int64_t answers = 0, passes = 0, tokens = 0;
  double ms = 0;
  std::string text() const {
    if (answers == 0) return "no answer yet";
    const double n = static_cast<double>(answers);
    return fmt::format("{} answers; each on average: {:.1f} forward passes, {:.1f} ms, {:.1f} tokens", answers,
                       static_cast<double>(passes) / n, ms / n, static_cast<double>(tokens) / n);
  }
};

// `tell` whether a person reads the diagnostics.
void answer_one(Generator& generator, const Question& question, bool tell, Stats* stats = nullptr) {
  Stream stream;
  const auto start = std::chrono::steady_clock::now();
  // Latents stand before the answer that they led to.
  const DecodeResult r =
      generator.answer({question}, generator.shows_latents() ? std::function<void(const std::string&)>() : std::ref(stream))[0];
  if (stats) {
    ++stats->answers, stats->passes += r.passes, stats->tokens += r.tokens;
    stats->ms += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
  generator.print_latents(r);
  const std::string text = generator.text(r.ids);
  stream.end(text);
  if (tell && text.empty()) print_note("the answer is empty" + generator.chat_hint());
  if (tell && r.hit_limit) print_note("stopped at the largest number of new tokens; raise --max-new-tokens for more");
  require_printed();
}

constexpr const char* kDialogueHelp =
    "One question a line; each is answered on its own.\n"
    "/latents  show the latents before an answer, or no more\n"
    "/cot      answer by a written chain (full_cot), or again by the run's method\n"
    "/method M answer by method M\n"
    "/stats    forward passes, ms and tokens of the answers so far\n"
    "/help     this text\n"
    "/quit     end";

// A line that begins with a known command; false for any other.
bool obey(const std::string& text, Generator& generator, const DecodeChoice& first, const Stats& stats) {
  const std::string word = text.substr(0, text.find(' ')), rest(stripped(std::string_view(text).substr(word.size())));
  if (word == "/help") return print_note(kDialogueHelp), true;
  if (word == "/stats") return print_note(stats.text()), true;
  if (word == "/latents") {
    if (generator.shows_latents()) generator.hide_latents();
    else generator.show_latents("/latents");
    print_note(generator.shows_latents() ? "latents are shown" : "latents are not shown");
    return true;
  }
  if (word != "/cot" && word != "/method") return false;
  if (word == "/method" && rest.empty())
    throw Error(Exit::usage, "/method", "its method is missing", remedy_for_word(rest, names_of(Method{})));
  DecodeChoice choice = first;
  const bool chain = word == "/cot" && generator.method() != Method::full_cot;
  if (word == "/method") choice.method = choice_option<Method>("/method", rest);
  else if (chain) choice.method = Method::full_cot;
  if (choice.method != first.method) choice.stage.reset();
  generator.choose(choice);
  print_note("method " + name_of(generator.method()));
  return true;
}

void dialogue(Generator& generator) {
  LineEditor lines;
  const bool terminal = lines.on_terminal();
  if (terminal) print_note("Ask a question; /help tells more, /quit or end of input ends.");
  const DecodeChoice first = generator.choice();
  Stats stats;
  std::string line, empty;  // the first of the empty lines before this one
  for (int64_t n = 1;; ++n) {
    if (!lines.next(line)) break;
    const std::string text(stripped(line));
    if (text == "/quit") return;
    if (text.empty()) {
      if (!terminal && empty.empty()) empty = fmt::format("stdin:{}", n);
      continue;
    }
    try {
      if (!empty.empty()) refuse_empty(empty);
      if (text[0] == '/' && obey(text, generator, first, stats)) continue;
      if (text[0] == '/')
        throw Error(Exit::usage, escaped(text.substr(0, text.find(' ')), 40), "is no command",
                    "see /help; a question that begins with / is asked by --file");
      answer_one(generator, {fmt::format("stdin:{}", n), text}, terminal, &stats);
    } catch (const Error& e) {
      if (!terminal || (e.code() != Exit::data && e.code() != Exit::usage)) throw;
      print_note(e.what());
    }
  }
  if (terminal) print_note("");
}

int generate(const GenerateCommand& command, bool has_question, Comm& comm, const World& world) {
  std::optional<ChosenModel> chosen;
  std::optional<Generator> generator;
  std::vector<Question> questions;
  std::string text;
  together(comm, "reading model and questions", [&] {
    if (command.file) questions = read_questions(*command.file);
    else if (has_question) questions.push_back({"QUESTION", std::string(stripped(command.question))});
    chosen.emplace(choose_model(command.model, world.local_rank));
    if (!chosen->opened.text.tokenizer)
      Tokenizer::refuse_missing(chosen->opened.text.folder, "no question can be read", "use kava_eval on rows of ids");
    generator.emplace(command, *chosen, comm);
    // What one rank refuses, all do before the first answer.
    for (const Question& q : questions) (void)generator->read(q), text += q.text + "\n";
  });
  require_same(comm, "the model", generator->base_digest() + " " + chosen->opened.weights, Exit::data);
  require_same(comm, "the questions", sha256(text), Exit::data);
  if (command.file) answer_file(*generator, questions, comm);
  else if (has_question) answer_one(*generator, questions[0], comm.leads());
  else dialogue(*generator);
  return 0;
}

int generate(const GenerateCommand& command, bool has_question) {
  if (has_question && command.file) throw Error(Exit::usage, "--file", "is given beside a question", "give one of them");
  if (has_question && stripped(command.question).empty()) throw Error(Exit::usage, "QUESTION", "is empty", "give a question");
  // Others have no work to keep.
  if (command.file) catch_signals();
  return on_ranks(command.ranks, command.model.device, [&](Comm& comm, const World& world) {
    if (!comm.alone() && !has_question && !command.file)
      throw Error(Exit::usage, "kava_generate", "several ranks hold no dialogue", "give a question or --file, or start one rank");
    return generate(command, has_question, comm, world);
  });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Answers a question, a file of questions, or a dialogue on the terminal", "kava_generate");
  app.footer(
      "Example (after tools/quickstart.sh):\n  kava_generate runs/quickstart/kava \"Rob has 3 apples. Gus has 9 more than Rob. "
      "Ann has 7 times Gus's. Dan has 7 times Ann's. How many apples does Dan have modulo 10?\" --latents");
  GenerateCommand command;
  kava::add_model_options(app, command.model)->required();
  kava::add_rank_options(app, command.ranks);
  CLI::Option* question =
      app.add_option("QUESTION", command.question, "The question; without it and --file, questions are read from the terminal");
  app.add_option("--file", command.file, "A text file with one question a line; one answer a line comes out");
  app.add_flag("--latents", command.latents,
               "Show each latent of the last pass as the token with the nearest first-layer value, and the head's top token");
  return kava::command_main(argc, argv, app, [&] { return generate(command, question->count() > 0); });
}

#include "engine/data/row_forms.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <regex>
#include <span>

namespace kava {

namespace {

using MemberNames = std::span<const std::string_view>;

// Keys as `plain` writes them; of several in a row the first of the list counts.
constexpr std::string_view kQuestion[] = {"question",    "problem",        "query",        "squestion",   "input",
                                          "instruction", "questionconcat", "originaltext", "newquestion", "prompt"};
constexpr std::string_view kChain[] = {"steps",          "cot",      "chainofthought", "rationale",         "reasoning",
                                       "reasoningsteps", "chain",    "solution",       "explanation",       "thought",
                                       "thoughts",       "thinking", "reasoningchain", "reasoningcontent",  "rationales",
                                       "reasoningtrace", "trace",    "derivation",     "generatedsolution", "scratchpad"};
constexpr std::string_view kAnswer[] = {"answer", "finalanswer", "finalans", "answernumber", "lsolutions", "expectedanswer", "groundtruth",
                                        "ans",    "target",      "response", "result",       "output",     "completion"};
// Where a row has a number beside a written answer, the number is the gold one.
constexpr std::string_view kNumber[] = {"finalanswer", "finalans", "answernumber", "lsolutions", "expectedanswer", "groundtruth", "ans",
                                        "answer",      "target",   "response",     "result",     "output",         "completion"};
constexpr std::size_t kOnlyShort = 7;  // of these, under which no chain stands

constexpr std::string_view kOptions[] = {"options", "choices"};

// A key as it is compared: lower case, without what projects put between its words.
std::string plain_key(std::string_view key) {
  std::string out;
  for (char c : key)
    if (c != '_' && c != '-' && c != ' ') out += c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return out;
}

struct Member {
  const std::string* key = nullptr;
  const Json* value = nullptr;
  explicit operator bool() const { return value != nullptr; }
  std::string name() const { return fmt::format("\"{}\"", escaped(*key, 60)); }
};

// The member under the first of `names` that the row has, null only where no other is there.
Member find(const Json& row, MemberNames names) {
  Member null;
  for (std::string_view name : names)
    for (const auto& [key, value] : row.get_ref<const Json::object_t&>()) {
      if (plain_key(key) != name) continue;
      if (!value.is_null()) return {&key, &value};
      if (!null) null = {&key, &value};
    }
  return null;
}

bool holds_nothing(const Json& value) {
  return value.is_null() || (value.is_array() && value.empty()) ||
         (value.is_string() && stripped(value.get_ref<const std::string&>()).empty());
}

// The member under the first of `names` that holds something, else the first one there is.
Member find_filled(const Json& row, MemberNames names) {
  for (std::string_view name : names)
    if (const Member m = find(row, MemberNames(&name, 1)); m && !holds_nothing(*m.value)) return m;
  return find(row, names);
}

Member find(const Json& row, std::string_view name) { return find(row, MemberNames(&name, 1)); }

// Rows that lie in a list inside one object, or the columns of a table.
std::string wrapped_in(const Json& row) {
  for (const auto& [key, value] : row.get_ref<const Json::object_t&>())
    if (value.is_array() && !value.empty() && value[0].is_object()) return key;
  return "";
}

// The key of a conversation, a list of messages.
std::string chat_in(const Json& row) {
  const std::string key = wrapped_in(row);
  if (key.empty()) return "";
  const Json& first = row[key][0];
  return first.contains("role") || first.contains("from") ? key : "";
}

[[noreturn]] void refuse_missing(const Json& row, const std::string& wanted, const RowPlace& place) {
  if (const std::string chat = chat_in(row); !chat.empty() && !find(row, kQuestion))
    place.refuse(fmt::format("the row is a conversation under \"{}\"", escaped(chat, 60)),
                 "write rows with \"question\", \"cot\" and \"answer\"");
  if (find(row, kQuestion) && find(row, kOptions))
    place.refuse(fmt::format("the answer is one of several options; the row's keys are {}", key_list(row)),
                 "write the right option's text under \"answer\", or take a set of open questions");
  if (const std::string list = wrapped_in(row); !list.empty() && row.size() <= 8 && !find(row, kQuestion))
    place.refuse(fmt::format("the rows lie in a list under \"{}\"", escaped(list, 60)), "write that list alone, or one row a line");
  place.refuse(fmt::format("the row has no {}; its keys are {}", wanted, key_list(row)),
               "rename its keys, or name the form by --format or {path = .., format = ..}");
}

Member member(const Json& row, MemberNames names, const RowPlace& place) {
  const Member m = find_filled(row, names);
  if (!m) refuse_missing(row, fmt::format("\"{}\"", names.front()), place);
  return m;
}

// Put into quotation marks it would be the word.
void refuse_null(const Member& m, const Json& value, const RowPlace& place) {
  if (value.is_null()) place.refuse(m.name() + " is null", fmt::format("give the {}, or leave the row out", escaped(*m.key, 60)));
}

const std::string& string_of(const Member& m, const RowPlace& place) {
  refuse_null(m, *m.value, place);
  if (!m.value->is_string())
    place.refuse(fmt::format("{} must be a string, not {}", m.name(), m.value->type_name()),
                 m.value->is_structured() ? "write one text, of one row" : "write it in quotation marks");
  return m.value->get_ref<const std::string&>();
}

void set_text(Row& row, std::string_view question, std::string_view answer, const RowPlace& place) {
  row.question = stripped(question);
  row.answer = stripped(answer);
  if (row.question.empty()) place.refuse("the question is empty");
  if (row.answer.empty()) place.refuse("the answer is empty");
}

void add_step(std::vector<std::string>& steps, std::string_view step) {
  step = stripped(step);
  if (!step.empty()) steps.emplace_back(step);
}

// Calls `take` with the pieces of `text` between separators; each keeps its first `kept` bytes of the separator.
template <class Take>
void split(std::string_view text, std::string_view separator, std::size_t kept, Take take) {
  for (std::size_t at; (at = text.find(separator)) != std::string_view::npos; text.remove_prefix(at + separator.size()))
    take(text.substr(0, at + kept));
  take(text);
}

// Whether there is nothing but `<<...>>` and white space.
bool only_annotations(std::string_view trace) {
  for (trace = stripped(trace); !trace.empty(); trace = stripped(trace)) {
    const auto end = trace.starts_with("<<") ? trace.find(">>", 2) : std::string_view::npos;
    if (end == std::string_view::npos) return false;
    trace.remove_prefix(end + 2);
  }
  return true;
}

std::vector<std::string> split_trace(std::string_view trace) {
  std::vector<std::string> steps;
  trace = stripped(trace);
  if (only_annotations(trace)) {
    while (!trace.empty()) {
      const auto end = std::min(trace.find_first_of(kSpace), trace.size());
      steps.emplace_back(trace.substr(0, end));
      trace = stripped(trace.substr(end));
    }
  } else {
    const bool lines = trace.find('\n') != std::string_view::npos;
    split(trace, lines ? "\n" : ". ", lines ? 0 : 1, [&](std::string_view step) { add_step(steps, step); });
  }
  return steps;
}

// Whether commas stand only where a number's groups of digits have them: three digits behind the last, two or three between two.
bool is_grouped(std::string_view digits) {
  auto comma = digits.rfind(',');
  if (comma == std::string_view::npos) return true;
  if (digits.size() - comma != 4) return false;
  for (;;) {
    const auto before = comma == 0 ? std::string_view::npos : digits.rfind(',', comma - 1);
    const bool first = before == std::string_view::npos;
    const auto length = comma - (first ? 0 : before + 1);
    if (length > 3 || length < (first ? 1 : 2)) return false;
    if (first) return true;
    comma = before;
  }
}

// Digits of a number written as text: without sign +, currency, commas, needless zeros and exponent; nothing where it is no number.
std::optional<std::string> plain_number(std::string_view text) {
  std::string s(stripped(text));
  if (s.starts_with('+')) s.erase(0, 1);
  const bool negative = s.starts_with('-');
  if (negative) s.erase(0, 1);
  for (const std::string_view currency : {"$", "\xE2\x82\xAC", "\xC2\xA3"})
    if (s.starts_with(currency)) s.erase(0, currency.size());
  if (s.size() > 400) return std::nullopt;
  const auto behind_whole = s.begin() + static_cast<std::ptrdiff_t>(std::min(s.find_first_of(".eE"), s.size()));
  if (!is_grouped({s.begin(), behind_whole})) return std::nullopt;
  s.erase(std::remove(s.begin(), behind_whole, ','), behind_whole);
  std::size_t i = 0;
  auto digits = [&] {
    const std::size_t start = i;
    while (i < s.size() && s[i] >= '0' && s[i] <= '9') ++i;
    return s.substr(start, i - start);
  };
  std::string whole = digits(), behind;
  if (i < s.size() && s[i] == '.') ++i, behind = digits();
  if (whole.empty() && behind.empty()) return std::nullopt;
  if (i < s.size()) {  // an exponent
    const std::size_t mark = i++;
    if (s[mark] != 'e' && s[mark] != 'E') return std::nullopt;
    if (i < s.size() && (s[i] == '+' || s[i] == '-')) ++i;
    if (digits().empty() || i < s.size()) return std::nullopt;
    const double value = std::strtod(s.c_str(), nullptr);
    return std::isfinite(value) ? std::optional(answer_text(negative ? -value : value)) : std::nullopt;
  }
  whole.erase(0, std::min(whole.find_first_not_of('0'), whole.size()));
  behind.erase(behind.find_last_not_of('0') + 1);
  if (whole.empty()) whole = "0";
  const bool zero = whole == "0" && behind.empty();
  return (negative && !zero ? "-" : "") + whole + (behind.empty() ? "" : "." + behind);
}

std::optional<std::string> number_text(const Json& value) {
  if (value.is_number_unsigned()) return fmt::format("{}", value.get<uint64_t>());
  if (value.is_number_integer()) return fmt::format("{}", value.get<int64_t>());
  if (value.is_number_float()) return answer_text(value.get<double>());
  if (value.is_string()) return plain_number(value.get_ref<const std::string&>());
  return std::nullopt;
}

std::string number_of(const Member& m, const RowPlace& place) {
  if (auto number = number_text(*m.value)) return *number;
  refuse_null(m, *m.value, place);
  if (!m.value->is_string()) place.refuse(fmt::format("{} must be a number, not {}", m.name(), m.value->type_name()));
  place.refuse(fmt::format("{} must be a number, not \"{}\"", m.name(), escaped(m.value->get_ref<const std::string&>(), 40)),
               "correct the row, or name the form qa, whose answers may be text, by --format or {path = .., format = ..}");
}

// Without what stands in brackets behind a blank, where these are all the rest: in "20 (a); 10 (b)" no unit is behind the whole.
std::string_view without_unit(std::string_view text) {
  const std::size_t open = text.find(" (");
  if (open == std::string_view::npos || !text.ends_with(')')) return text;
  int64_t depth = 0;
  for (const char c : text.substr(open + 1, text.size() - open - 2))
    if ((depth += (c == '(') - (c == ')')) == 0) return text;
  return text.substr(0, open);
}

// A number, alone in a list as well, or another short answer, without a unit behind it.
std::string short_answer(const Member& m, const RowPlace& place) {
  const bool list = m.value->is_array() && m.value->size() == 1;
  const Json& value = list ? (*m.value)[0] : *m.value;
  if (auto number = number_text(value)) return *number;
  refuse_null(m, value, place);
  if (!value.is_string()) place.refuse(fmt::format("{} must be a number or text, not {}", m.name(), list ? "a list" : value.type_name()));
  const std::string_view text = stripped(value.get_ref<const std::string&>());
  if (text.find("####") != std::string_view::npos)
    place.refuse(m.name() + " holds a chain and ####, that of the first row does not",
                 "keep rows of one form in a file, or name the form by --format or {path = .., format = ..}");
  const std::string_view before = without_unit(text);
  return plain_number(before).value_or(std::string(before));
}

// The last line where it is `#### ANSWER`.
std::optional<std::string_view> marked_answer(std::string_view text, std::string_view* before = nullptr) {
  text = stripped(text);
  const auto newline = text.rfind('\n');
  const auto start = newline == std::string_view::npos ? 0 : newline + 1;
  const std::string_view last = stripped(text.substr(start));
  if (before) *before = text.substr(0, start);
  return last.starts_with("####") ? std::optional(last.substr(4)) : std::nullopt;
}

// The chain under one of its keys; nothing where the row has none, and no step where it is null.
std::optional<std::vector<std::string>> chain_of(const Json& row, const RowPlace& place) {
  const Member m = find_filled(row, kChain);
  if (!m) return std::nullopt;
  std::vector<std::string> steps;
  if (m.value->is_null()) return steps;
  if (m.value->is_string() && plain_key(*m.key) != "steps") {
    std::string_view text = m.value->get_ref<const std::string&>(), before;
    return split_trace(marked_answer(text, &before) ? before : text);  // the answer is no step
  }
  if (!m.value->is_array())
    place.refuse(fmt::format("{} must be a list of strings, not {}", m.name(), m.value->type_name()),
                 m.value->is_string() ? "give a list, or put a chain that is one text under \"cot\"" : "give a list of strings");
  for (const Json& step : *m.value) {
    if (!step.is_string()) place.refuse(fmt::format("{} must hold strings, not {}", m.name(), step.type_name()));
    add_step(steps, step.get_ref<const std::string&>());
  }
  return steps;
}

const Json& ids_member(const Json& row, std::string_view key, const RowPlace& place) {
  const auto value = row.find(key);
  if (value == row.end()) refuse_missing(row, fmt::format("\"{}\"", key), place);
  return *value;
}

std::vector<int32_t> ids_in(const Json& value, std::string_view key, const RowPlace& place) {
  if (!value.is_array()) place.refuse(fmt::format("\"{}\" must be a list of token ids, not {}", key, value.type_name()));
  std::vector<int32_t> ids;
  ids.reserve(value.size());
  for (const Json& id : value) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > std::numeric_limits<int32_t>::max())
      place.refuse(
          fmt::format("\"{}\" holds {}, which is no token id", key, escaped(id.dump(-1, ' ', true, Json::error_handler_t::replace), 40)));
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

std::vector<int32_t> ids_of(const Json& row, std::string_view key, const RowPlace& place) {
  return ids_in(ids_member(row, key, place), key, place);
}

// A list of ids, one step, or a list of such lists, one for each step.
void read_ids_trace(Row& row, const Json& object, const RowPlace& place) {
  const Json& trace = ids_member(object, "trace", place);
  const bool by_step = trace.is_array() && !trace.empty() && trace[0].is_array();
  for (std::size_t i = 0; i < (by_step ? trace.size() : 1); ++i) {
    const std::vector<int32_t> ids = ids_in(by_step ? trace[i] : trace, "trace", place);
    if (ids.empty()) continue;
    row.trace_ids.insert(row.trace_ids.end(), ids.begin(), ids.end());
    row.step_lengths.push_back(static_cast<int32_t>(ids.size()));
  }
}

Row parse_ids(const Json& object, const RowPlace& place) {
  Row row;
  row.is_ids = true;
  if (const Json& q = ids_member(object, "question", place); q.is_array() && !q.empty() && q[0].is_string())
    place.refuse("the row holds whole columns: \"question\" is a list of texts", "write one object a row");
  row.question_ids = ids_of(object, "question", place);
  read_ids_trace(row, object, place);
  row.answer_ids = ids_of(object, "answer", place);
  if (row.question_ids.empty()) place.refuse("the question is empty");
  if (row.answer_ids.empty()) place.refuse("the answer is empty");
  if (const auto prompt = object.find("prompt"); prompt != object.end()) {
    if (!prompt->is_number_unsigned() || prompt->get<uint64_t>() >= row.answer_ids.size())
      place.refuse(
          fmt::format("\"prompt\" must be a whole number from 0 to {}: less than the length of the answer", row.answer_ids.size() - 1));
    row.prompt = prompt->get<int64_t>();
  }
  return row;
}

std::string without_annotations(std::string_view text) {
  std::string out;
  for (;;) {
    const auto open = text.find("<<"), close = text.find(">>", open == std::string_view::npos ? open : open + 2);
    if (close == std::string_view::npos) return out.append(text);
    out.append(text.substr(0, open));
    text.remove_prefix(close + 2);
  }
}

// The numbers of a row that keeps them apart from its text (MAWPS): a list, or a text with blanks or commas between them.
std::vector<std::string> numbers_of(const Member& m, const RowPlace& place) {
  std::vector<std::string> numbers;
  if (m.value->is_array()) {
    for (const Json& number : *m.value) numbers.push_back(number_text(number).value_or(""));
  } else {
    const std::string& text = string_of(m, place);
    for (std::size_t at = 0; (at = text.find_first_not_of(" ,\t\n", at)) != std::string::npos;) {
      const std::size_t end = std::min(text.find_first_of(" ,\t\n", at), text.size());
      numbers.push_back(plain_number(text.substr(at, end - at)).value_or(""));
      at = end;
    }
  }
  if (std::ranges::count(numbers, std::string())) place.refuse(m.name() + " holds what is no number");
  return numbers;
}

// With the row's numbers in place of N_00, N_01, .. or number0, number1, ..
std::string filled_in(const std::string& text, const Json& row, const RowPlace& place) {
  static const std::regex marks(R"(\bN_(\d\d)\b|\bnumber(\d\d?)\b)");
  const Member given = find(row, "numbers");
  if (!given && text.find("N_") == std::string::npos) return text;
  std::vector<std::string> numbers;
  std::string out;
  auto at = text.begin();
  for (std::sregex_iterator i(text.begin(), text.end(), marks), end; i != end; ++i) {
    const std::smatch& mark = *i;
    if (!given && mark[2].matched) continue;  // a word of the question
    if (!given)
      place.refuse("the question has places for numbers (N_00), and the row no \"Numbers\"", "write the numbers into the question");
    if (numbers.empty()) numbers = numbers_of(given, place);
    const auto number = static_cast<std::size_t>(std::atoi(mark[mark[1].matched ? 1 : 2].str().c_str()));
    if (number >= numbers.size())
      place.refuse(fmt::format("{} has {} numbers, and the question asks for {}", given.name(), numbers.size(), mark.str()));
    out.append(at, mark[0].first).append(numbers[number]);
    at = mark[0].second;
  }
  return out.append(at, text.end());
}

std::string question_of(const Json& row, const RowPlace& place) {
  return filled_in(string_of(member(row, kQuestion, place), place), row, place);
}

// Body and Question, by a space; of the form qa, and of MAWPS, whose rows have "Numbers", the question alone where it holds the body.
std::string whole_question(const Json& row, DataFormat format, const RowPlace& place) {
  const Member body = find(row, "body"), question = find(row, "question");
  if (!body) refuse_missing(row, "\"Body\"", place);
  if (!question) refuse_missing(row, "\"Question\"", place);
  const std::string& asked = string_of(question, place);
  if (stripped(asked).empty()) place.refuse(question.name() + " is empty");
  const std::string_view before = stripped(string_of(body, place));
  const bool whole = (format == DataFormat::qa || find(row, "numbers")) && stripped(asked).starts_with(before);
  return filled_in(whole ? asked : fmt::format("{} {}", before, stripped(asked)), row, place);
}

Row parse_jsonl(const Json& object, const RowPlace& place) {
  Row row;
  const Member found = member(object, kAnswer, place);
  // Beside "steps" an answer is text; other sets have a number there.
  const Member chain = find_filled(object, kChain);
  const bool steps_key = chain && plain_key(*chain.key) == "steps";
  const std::string answer = found.value->is_number() && chain && !steps_key ? number_of(found, place) : string_of(found, place);
  const auto marked = steps_key ? std::nullopt : marked_answer(answer);
  set_text(row, question_of(object, place), marked && !stripped(*marked).empty() ? *marked : answer, place);
  auto steps = chain_of(object, place);
  if (!steps) refuse_missing(object, "\"steps\" (a list) or \"cot\" (a text)", place);
  row.steps = *std::move(steps);
  return row;
}

Row parse_gsm8k(const Json& object, const RowPlace& place) {
  std::string_view before;
  const Member found = member(object, kAnswer, place);
  const auto marked = marked_answer(string_of(found, place), &before);
  if (!marked)
    place.refuse(fmt::format("no #### before the answer: the last line of {} must be #### ANSWER; the row's keys are {}", found.name(),
                             key_list(object)),
                 "correct the row, or name the form by --format or {path = .., format = ..}");
  Row row;
  set_text(row, question_of(object, place), *marked, place);
  row.steps = split_trace(without_annotations(before));
  if (row.steps.empty()) row.steps = chain_of(object, place).value_or(std::vector<std::string>{});
  return row;
}

// svamp, gsm_hard and qa: an answer, and a chain only where a key says so.
Row parse_short(const Json& object, DataFormat format, const RowPlace& place) {
  constexpr std::string_view hard_question[] = {"input", "instruction", "question"}, hard_answer[] = {"target", "response", "answer"};
  Row row;
  if (format == DataFormat::svamp) {
    set_text(row, whole_question(object, format, place), number_of(member(object, std::span(kAnswer).first(1), place), place), place);
  } else if (format == DataFormat::gsm_hard) {
    set_text(row, filled_in(string_of(member(object, hard_question, place), place), object, place),
             number_of(member(object, hard_answer, place), place), place);
  } else {
    const std::string question = find(object, "body") ? whole_question(object, format, place) : question_of(object, place);
    set_text(row, question, short_answer(member(object, kNumber, place), place), place);
  }
  auto steps = chain_of(object, place);
  row.has_trace = steps.has_value();
  if (steps) row.steps = *std::move(steps);
  return row;
}

}  // namespace

std::string key_list(const Json& row) {
  std::string out;
  for (const auto& [key, value] : row.get_ref<const Json::object_t&>()) {
    if (out.size() > 200) return out + ", ..";
    out += (out.empty() ? "" : ", ") + escaped(key, 40);
  }
  return out.empty() ? "none" : out;
}

bool names_question(std::string_view key) { return plain_key(key) == "body" || std::ranges::count(kQuestion, plain_key(key)) > 0; }

DataFormat recognised_format(const Json& row) {
  if (const auto question = row.find("question"); question != row.end() && question->is_array()) return DataFormat::ids;
  if (row.contains("Body")) {  // ASDiv's tags as well, whose answers have units
    const Member answer = find(row, std::span(kAnswer).first(1));
    const bool text = answer && answer.value->is_string() && !number_text(*answer.value);
    return text || find(row, "formula") || find(row, "solutiontype") ? DataFormat::qa : DataFormat::svamp;
  }
  const bool chain = static_cast<bool>(find(row, kChain));
  const auto filled = [&](std::string_view name) {
    const Member m = find(row, name);
    return m && !holds_nothing(*m.value);
  };
  const auto number = [&](MemberNames names) {
    const Member m = find(row, names);
    return m && number_text(*m.value);
  };
  constexpr std::string_view answers[] = {"response", "answer"};
  if (filled("input") && (row.contains("target") || (!chain && (number(answers) || !find(row, kAnswer))))) return DataFormat::gsm_hard;
  const auto answer = row.find("answer");
  constexpr std::string_view jsonl_chain[] = {"steps", "cot"};
  if (row.contains("question") && answer != row.end() && answer->is_string() && marked_answer(answer->get_ref<const std::string&>()) &&
      !find(row, jsonl_chain))
    return DataFormat::gsm8k;
  if (chain) return DataFormat::jsonl;
  if (find(row, "instruction") && number(MemberNames(answers, 1))) return DataFormat::gsm_hard;
  if (find(row, "body")) return DataFormat::qa;
  // A gold answer that is nothing but a number has no chain in front of it; under these keys there never is one.
  return find(row, std::span(kNumber).first(kOnlyShort)) || number(kNumber) ? DataFormat::qa : DataFormat::gsm8k;
}

Row parse_text_row(std::string_view line, const RowPlace& place) {
  if (!is_utf8(line)) place.refuse("is not valid UTF-8", "save the file as UTF-8");
  const auto bars = line.find("||");
  if (bars == std::string_view::npos) place.refuse("no || after the question", "write question||steps #### answer");
  const std::string_view rest = line.substr(bars + 2);
  const auto marks = rest.rfind("####");
  if (marks == std::string_view::npos) place.refuse("no #### before the answer", "write question||steps #### answer");
  Row row;
  set_text(row, line.substr(0, bars), rest.substr(marks + 4), place);
  row.steps = split_trace(rest.substr(0, marks));
  return row;
}

Row parse_json_row(const Json& row, DataFormat format, const RowPlace& place) {
  if (!row.is_object()) place.refuse(fmt::format("a row must be a JSON object, not {}", row.type_name()));
  switch (format) {
    case DataFormat::ids:
      return parse_ids(row, place);
    case DataFormat::jsonl:
      return parse_jsonl(row, place);
    case DataFormat::gsm8k:
      return parse_gsm8k(row, place);
    default:
      return parse_short(row, format, place);
  }
}

}  // namespace kava

#include "models/token_cache.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "engine/error.h"
#include "engine/files/cache.h"
#include "engine/files/digest.h"
#include "engine/files/files.h"
#include "engine/files/parts.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr std::string_view kMagic = "kava tokens 1\n";
constexpr std::size_t kDigest = 64;  // hex digits at the end, of all before

// Whole numbers and text, in the machine's order of bytes.
class Writer {
 public:
  explicit Writer(const std::string& path) : file_(path) {}
  void text(std::string_view bytes) { number(static_cast<int64_t>(bytes.size())), raw(bytes.data(), bytes.size()); }
  void number(int64_t n) { raw(&n, sizeof n); }
  void ids(const std::vector<int32_t>& ids) { number(std::ssize(ids)), raw(ids.data(), ids.size() * sizeof(int32_t)); }
  void raw(const void* bytes, std::size_t count) {
    buffer_.append(static_cast<const char*>(bytes), count);
    if (buffer_.size() >= kBuffer) flush();
  }
  void commit() {
    flush();
    file_.write(digest_.hex());
    file_.commit();
  }

 private:
  static constexpr std::size_t kBuffer = std::size_t{1} << 20;
  void flush() {
    digest_.add(buffer_.data(), buffer_.size());
    file_.write(buffer_);
    buffer_.clear();
  }
  FileWriter file_;
  Digest digest_;
  std::string buffer_;
};

// Refuses by Error(code data) what does not fit into the file, before anything is allocated for it.
class Reader {
 public:
  explicit Reader(const std::string& path) : file_(path), left_(file_.size() < kDigest ? 0 : file_.size() - kDigest) {}
  std::string text() {
    std::string out(count(1), '\0');
    raw(out.data(), out.size());
    return out;
  }
  int64_t number() {
    int64_t n = 0;
    raw(&n, sizeof n);
    return n;
  }
  /// From 0 to `most`.
  int64_t number(int64_t most) {
    const int64_t n = number();
    require(n >= 0 && n <= most);
    return n;
  }
  std::vector<int32_t> ids(int64_t below) {
    std::vector<int32_t> out(count(sizeof(int32_t)));
    raw(out.data(), out.size() * sizeof(int32_t));
    require(std::ranges::all_of(out, [&](int32_t id) { return id >= 0 && id < below; }));
    return out;
  }
  /// How many things of so many bytes follow.
  std::size_t count(std::size_t bytes) { return static_cast<std::size_t>(number(static_cast<int64_t>(left_ / bytes))); }
  void raw(void* bytes, std::size_t count) {
    require(count <= left_);
    left_ -= count;
    for (auto* to = static_cast<char*>(bytes); count > 0;) {
      if (at_ == buffer_.size()) fill();
      const std::size_t some = std::min(count, buffer_.size() - at_);
      std::memcpy(to, buffer_.data() + at_, some);
      at_ += some, to += some, count -= some;
    }
  }
  void end() {
    require(left_ == 0 && at_ == buffer_.size());
    std::string digest(kDigest, '\0');
    file_.read_at(read_, digest.data(), kDigest);
    require(digest == digest_.hex());
  }
  void require(bool holds) const {
    if (!holds) throw Error(Exit::data, file_.path(), "is no file of tokens");
  }

 private:
  void fill() {
    buffer_.resize(std::min<std::size_t>(std::size_t{1} << 20, file_.size() - kDigest - read_));
    require(!buffer_.empty());
    file_.read_at(read_, buffer_.data(), buffer_.size());
    digest_.add(buffer_.data(), buffer_.size());
    read_ += buffer_.size(), at_ = 0;
  }
  FileReader file_;
  std::size_t left_, at_ = 0;  // bytes that are not taken; place in the buffer
  std::uint64_t read_ = 0;
  std::string buffer_;
  Digest digest_;
};

Sample read_sample(Reader& in, int64_t vocab, int64_t rows) {
  Sample s;
  s.question = in.ids(vocab), s.trace = in.ids(vocab), s.answer = in.ids(vocab);
  s.steps = in.ids(std::ssize(s.trace) + 1);
  s.prompt = static_cast<int32_t>(in.number(std::ssize(s.answer)));
  s.row = in.number(rows - 1), s.line = in.number(INT64_MAX);
  s.blank = static_cast<int32_t>(in.number(1));
  in.require(!s.question.empty() && !s.answer.empty() &&
             std::accumulate(s.steps.begin(), s.steps.end(), int64_t{0}) == std::ssize(s.trace));
  return s;
}

void keep_newest(const fs::path& folder) {
  std::error_code failed;
  std::vector<std::pair<fs::file_time_type, fs::path>> files;
  for (const fs::directory_entry& e : fs::directory_iterator(folder, failed))
    if (e.path().extension() == ".bin" && e.is_regular_file(failed)) files.emplace_back(e.last_write_time(failed), e.path());
  std::ranges::sort(files, std::greater<>());
  for (std::size_t i = TokenCache::kMost; i < files.size(); ++i) fs::remove(files[i].second, failed);
}

}  // namespace

TokenCache::TokenCache(const std::string& key) : key_(key) {
  if (const fs::path folder = cache_folder(); !folder.empty()) path_ = folder / "tokens" / (key + ".bin");
}

std::optional<TrainSamples> TokenCache::read(const std::vector<DataFile>& files, int64_t vocab) const {
  if (path_.empty() || !is_there(path_)) return std::nullopt;
  try {
    Reader in(path_.string());
    in.require(in.text() == kMagic && in.text() == key_);
    TrainSamples all;
    int64_t rows = 0;
    in.require(in.number() == std::ssize(files));
    for (const DataFile& file : files) {
      const std::optional<DataFormat> format = choice_of<DataFormat>(in.text());
      in.require(format.has_value());
      FileFacts facts{file.path, *format, in.text(), in.text(), in.number(INT32_MAX), in.number(1) == 1};
      rows += facts.rows;
      all.files.push_back(std::move(facts));
    }
    all.left_out.by_answer = in.number(rows);
    constexpr std::size_t kSmallest = 8 * sizeof(int64_t);
    const std::size_t n = in.count(kSmallest);
    all.samples.reserve(n);
    for (std::size_t i = 0; i < n; ++i) {
      all.samples.push_back(read_sample(in, vocab, rows));
      in.require(i == 0 || all.samples[i].row > all.samples[i - 1].row);
    }
    in.end();
    return all;
  } catch (const Error&) {
    return std::nullopt;
  }
}

void TokenCache::write(const TrainSamples& all) const {
  if (path_.empty()) return;
  try {
    const MadeFolder folder(path_.parent_path());
    Writer out(path_.string());
    out.text(kMagic), out.text(key_);
    out.number(std::ssize(all.files));
    for (const FileFacts& f : all.files)
      out.text(name_of(f.format)), out.text(f.sha256), out.text(f.keys), out.number(f.rows), out.number(f.chain);
    out.number(all.left_out.by_answer), out.number(std::ssize(all.samples));
    for (const Sample& s : all.samples) {
      out.ids(s.question), out.ids(s.trace), out.ids(s.answer), out.ids(s.steps);
      out.number(s.prompt), out.number(s.row), out.number(s.line), out.number(s.blank);
    }
    out.commit();
    keep_newest(path_.parent_path());
  } catch (const Error&) {
    // The next start makes them again.
  }
}

}  // namespace kava

#include "engine/files/torch_file.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <filesystem>
#include <map>
#include <utility>
#include <vector>

namespace kava {

namespace {

constexpr std::uint64_t kLargestPart = std::uint64_t{16} << 20;  // of the directory and of the pickle
constexpr std::size_t kMostNodes = 1'000'000;                    // some 30,000 tensors
constexpr std::size_t kMostTensors = 100'000, kMostTensorDims = 8, kLongestText = 1000;
constexpr const char* kNoTorchFile = "write it anew with torch.save(model.state_dict(), FILE), or as safetensors";

constexpr const char* kNoZip = "is no file of torch.save of version 1.6 or newer: it has no zip directory";

[[noreturn]] void refuse_torch(const std::string& path, const std::string& what) {
  throw Error(Exit::data, shown_path(path), what, kNoTorchFile);
}

template <class T>
T number_at(const std::string& bytes, std::size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

struct ZipEntry {
  std::uint64_t begin = 0, size = 0;  // of its bytes in the file
};

// The entries of an archive without compression, by name.
class ZipFile {
 public:
  explicit ZipFile(const FileReader& file) : file_(file) {
    const auto [count, begin, size] = find_directory();
    const std::string directory = read(begin, size, "directory");
    std::size_t at = 0;
    for (std::uint64_t i = 0; i < count; ++i) at = read_entry(directory, at);
  }
  const std::map<std::string, ZipEntry>& entries() const { return entries_; }
  std::string read(std::uint64_t begin, std::uint64_t size, const char* what) const {
    if (size > kLargestPart) refuse_torch(file_.path(), fmt::format("has a {} of {} bytes, more than {}", what, size, kLargestPart));
    if (begin > file_.size() || size > file_.size() - begin) refuse_torch(file_.path(), fmt::format("ends inside its {}", what));
    std::string bytes(size, '\0');
    file_.read_at(begin, bytes.data(), bytes.size());
    return bytes;
  }

 private:
  struct Directory {
    std::uint64_t count, begin, size;
  };

  Directory find_directory() const {
    constexpr std::uint64_t kEnd = 22, kLocator = 20, kEnd64 = 56;
    if (file_.size() < kEnd) refuse_torch(file_.path(), kNoZip);
    const std::uint64_t tail_size = std::min<std::uint64_t>(file_.size(), kEnd + kLocator + 65535), tail_begin = file_.size() - tail_size;
    const std::string tail = read(tail_begin, tail_size, "directory");
    const std::size_t at = tail.rfind("PK\5\6");
    if (at == std::string::npos || at + kEnd > tail.size()) refuse_torch(file_.path(), kNoZip);
    const Directory small{number_at<std::uint16_t>(tail, at + 10), number_at<std::uint32_t>(tail, at + 16),
                          number_at<std::uint32_t>(tail, at + 12)};
    if (small.count != 0xffff && small.begin != 0xffffffff && small.size != 0xffffffff) return small;
    if (at < kLocator || tail.compare(at - kLocator, 4, "PK\6\7") != 0) refuse_torch(file_.path(), "has a damaged zip directory");
    const std::string end = read(number_at<std::uint64_t>(tail, at - kLocator + 8), kEnd64, "directory");
    if (!end.starts_with("PK\6\6")) refuse_torch(file_.path(), "has a damaged zip directory");
    return {number_at<std::uint64_t>(end, 32), number_at<std::uint64_t>(end, 48), number_at<std::uint64_t>(end, 40)};
  }

  // The entry at this place of the directory; where the next one begins.
  std::size_t read_entry(const std::string& directory, std::size_t at) {
    constexpr std::size_t kHead = 46, kLocalHead = 30;
    if (directory.size() - at < kHead || directory.compare(at, 4, "PK\1\2") != 0) refuse_torch(file_.path(), "has a damaged zip directory");
    const std::size_t name_size = number_at<std::uint16_t>(directory, at + 28), extra = number_at<std::uint16_t>(directory, at + 30),
                      comment = number_at<std::uint16_t>(directory, at + 32), all = kHead + name_size + extra + comment;
    if (directory.size() - at < all) refuse_torch(file_.path(), "has a damaged zip directory");
    const std::string name = directory.substr(at + kHead, name_size);
    if (number_at<std::uint16_t>(directory, at + 10) != 0) refuse_torch(file_.path(), "\"" + escaped(name) + "\" in it is compressed");
    std::uint64_t packed = number_at<std::uint32_t>(directory, at + 20), size = number_at<std::uint32_t>(directory, at + 24),
                  local = number_at<std::uint32_t>(directory, at + 42);
    take_large_sizes(directory.substr(at + kHead + name_size, extra), {&size, &packed, &local});
    const std::string head = read(local, kLocalHead, "entry");
    const std::uint64_t begin =
        local + kLocalHead + number_at<std::uint16_t>(head, 26) + number_at<std::uint16_t>(head, 28);  // no overflow: local is in the file
    if (!head.starts_with("PK\3\4") || begin > file_.size() || size > file_.size() - begin)
      refuse_torch(file_.path(), "\"" + escaped(name) + "\" in it reaches beyond the end of the file");
    entries_[name] = {begin, size};
    return at + all;
  }

  // Numbers that 32 bits do not hold stand in the extra field, in this order.
  void take_large_sizes(const std::string& extra, std::initializer_list<std::uint64_t*> numbers) const {
    for (std::size_t at = 0; extra.size() - at >= 4;) {
      const std::size_t id = number_at<std::uint16_t>(extra, at), size = number_at<std::uint16_t>(extra, at + 2);
      std::size_t from = at + 4;
      if (extra.size() - from < size) return;
      if (id == 1)
        for (std::uint64_t* number : numbers)
          if (*number == 0xffffffff && at + 4 + size - from >= 8) *number = number_at<std::uint64_t>(extra, from), from += 8;
      at += 4 + size;
    }
  }

  const FileReader& file_;
  std::map<std::string, ZipEntry> entries_;
};

struct StorageKind {
  const char *name, *dtype;
  std::int64_t bytes;
};
constexpr StorageKind kStorages[] = {{"DoubleStorage", "F64", 8},    {"FloatStorage", "F32", 4}, {"HalfStorage", "F16", 2},
                                     {"BFloat16Storage", "BF16", 2}, {"LongStorage", "I64", 8},  {"IntStorage", "I32", 4},
                                     {"ShortStorage", "I16", 2},     {"CharStorage", "I8", 1},   {"ByteStorage", "U8", 1},
                                     {"BoolStorage", "BOOL", 1}};

// A value of the pickle.
struct Node {
  enum class Kind { none, number, text, name, tuple, dict, storage, tensor } kind = Kind::none;
  std::int64_t number = 0;     // of a tensor: its place among them
  std::string text;            // of a name: "MODULE NAME"
  std::vector<Node*> items{};  // of a dict: key, value, key, value ..
  const StorageKind* storage = nullptr;
  const ZipEntry* entry = nullptr;  // of a storage
};

// The machine that a pickle is a program of, without anything that it could call but the making of tensors.
class Pickle {
 public:
  Pickle(const std::string& path, const std::string& code, const ZipFile& zip, const std::string& folder)
      : path_(path), code_(code), zip_(zip), folder_(folder) {}

  std::vector<TensorInfo> run() {
    while (step()) {
    }
    const Node* dict = pop();
    if (dict->kind != Node::Kind::dict) refuse_torch(path_, "holds no dict of tensors");
    if (dict->items.size() > 2 * kMostTensors) refuse_torch(path_, "has a pickle of too many values");
    std::vector<TensorInfo> tensors;
    for (std::size_t i = 0; i + 1 < dict->items.size(); i += 2) {
      const Node &key = *dict->items[i], &value = *dict->items[i + 1];
      if (key.kind != Node::Kind::text || value.kind != Node::Kind::tensor)
        refuse_torch(path_, "holds more than tensors by name, at \"" + escaped(key.text) + "\"");
      tensors.push_back(made_[static_cast<std::size_t>(value.number)]);
      tensors.back().name = key.text;
    }
    return tensors;
  }

 private:
  using Kind = Node::Kind;

  [[noreturn]] void damaged() const { refuse_torch(path_, "has a pickle that is damaged, or of no dict of tensors"); }

  Node* make(Kind kind) {
    if (nodes_.size() >= kMostNodes) refuse_torch(path_, "has a pickle of too many values");
    nodes_.emplace_back().kind = kind;
    return &nodes_.back();
  }
  Node* push(Node* node) { return stack_.push_back(node), node; }
  Node* pop() {
    if (stack_.empty() || (!marks_.empty() && stack_.size() <= marks_.back())) damaged();
    Node* top = stack_.back();
    stack_.pop_back();
    return top;
  }
  Node* top() {
    Node* node = pop();
    return push(node);
  }
  std::vector<Node*> pop_to_mark() {
    if (marks_.empty()) damaged();
    const auto from = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
    std::vector<Node*> items(from, stack_.end());
    stack_.erase(from, stack_.end());
    marks_.pop_back();
    return items;
  }

  template <class T>
  T take() {
    if (code_.size() - at_ < sizeof(T)) damaged();
    const T value = number_at<T>(code_, at_);
    at_ += sizeof(T);
    return value;
  }
  std::string take_text(std::size_t size) {
    if (size > kLongestText || code_.size() - at_ < size) damaged();
    return code_.substr(std::exchange(at_, at_ + size), size);
  }
  std::string take_line() {
    const std::size_t end = code_.find('\n', at_);
    if (end == std::string::npos || end - at_ > kLongestText) damaged();
    const std::string line = code_.substr(at_, end - at_);
    at_ = end + 1;
    return line;
  }

  void push_number(std::int64_t value) { push(make(Kind::number))->number = value; }
  void push_tuple(std::vector<Node*> items) { push(make(Kind::tuple))->items = std::move(items); }
  void push_tuple_of(std::size_t count) {
    std::vector<Node*> items(count);
    for (std::size_t i = count; i-- > 0;) items[i] = pop();
    push_tuple(std::move(items));
  }
  // Little-endian, of any length in the file; of eight bytes at most here.
  void push_long() {
    const std::size_t size = take<std::uint8_t>();
    if (size > 8) damaged();
    std::uint64_t value = 0;
    const std::string bytes = take_text(size);
    for (std::size_t i = 0; i < size; ++i) value |= std::uint64_t{static_cast<unsigned char>(bytes[i])} << (8 * i);
    if (size > 0 && size < 8 && (value >> (8 * size - 1)) != 0) value |= ~std::uint64_t{0} << (8 * size);
    push_number(static_cast<std::int64_t>(value));
  }
  void set_items(const std::vector<Node*>& pairs) {
    Node* dict = top();
    if (dict->kind != Kind::dict || pairs.size() % 2 != 0) damaged();
    dict->items.insert(dict->items.end(), pairs.begin(), pairs.end());
  }
  void remember(std::size_t slot) { memo_[slot] = top(); }
  void recall(std::size_t slot) {
    const auto at = memo_.find(slot);
    if (at == memo_.end()) damaged();
    push(at->second);
  }

  // ('storage', torch.FloatStorage, entry, device, elements)
  void load_storage() {
    const Node* id = pop();
    if (id->kind != Kind::tuple || id->items.size() != 5 || id->items[1]->kind != Kind::name || id->items[2]->kind != Kind::text) damaged();
    Node* storage = make(Kind::storage);
    for (const StorageKind& kind : kStorages)
      if (id->items[1]->text == std::string("torch ") + kind.name) storage->storage = &kind;
    if (!storage->storage) refuse_torch(path_, "has a tensor of the type " + escaped(id->items[1]->text));
    const std::string name = folder_ + "data/" + id->items[2]->text;
    const auto at = zip_.entries().find(name);
    if (at == zip_.entries().end()) refuse_torch(path_, "lacks \"" + escaped(name) + "\"");
    storage->entry = &at->second;
    push(storage);
  }

  std::vector<std::int64_t> numbers(const Node* tuple) const {
    if (tuple->kind != Kind::tuple || tuple->items.size() > kMostTensorDims) damaged();
    std::vector<std::int64_t> out;
    for (const Node* n : tuple->items) {
      if (n->kind != Kind::number || n->number < 0) damaged();
      out.push_back(n->number);
    }
    return out;
  }

  // torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ..)
  Node* rebuild_tensor(const Node* arguments) {
    if (arguments->items.size() < 4 || arguments->items[0]->kind != Kind::storage || arguments->items[1]->kind != Kind::number) damaged();
    const Node* storage = arguments->items[0];
    const std::vector<std::int64_t> strides = numbers(arguments->items[3]);
    TensorInfo t;
    t.dtype = storage->storage->dtype, t.shape = numbers(arguments->items[2]);
    if (t.shape.size() != strides.size()) damaged();
    std::int64_t count = 1;
    for (std::size_t i = t.shape.size(); i-- > 0;) {
      if (t.shape[i] != 1 && strides[i] != count) refuse_torch(path_, "has a tensor that does not lie in one piece");
      if (__builtin_mul_overflow(count, t.shape[i], &count)) damaged();
    }
    const std::int64_t offset = arguments->items[1]->number, bytes = storage->storage->bytes;
    std::int64_t begin = 0, size = 0;
    if (offset < 0 || __builtin_mul_overflow(offset, bytes, &begin) || __builtin_mul_overflow(count, bytes, &size)) damaged();
    const ZipEntry& entry = *storage->entry;
    if (static_cast<std::uint64_t>(begin) > entry.size || static_cast<std::uint64_t>(size) > entry.size - static_cast<std::uint64_t>(begin))
      refuse_torch(path_, "has a tensor that reaches beyond its storage");
    t.begin = entry.begin + static_cast<std::uint64_t>(begin), t.end = t.begin + static_cast<std::uint64_t>(size);
    Node* node = make(Kind::tensor);
    node->number = static_cast<std::int64_t>(made_.size());
    made_.push_back(std::move(t));
    return node;
  }

  // Of what could be called: making an empty dict, a tensor, and a parameter of one.
  void reduce() {
    const Node *arguments = pop(), *callee = pop();
    if (callee->kind != Kind::name || arguments->kind != Kind::tuple) damaged();
    if (callee->text == "collections OrderedDict" && arguments->items.empty()) push(make(Kind::dict));
    else if (callee->text == "torch._utils _rebuild_tensor_v2") push(rebuild_tensor(arguments));
    else if (callee->text == "torch._utils _rebuild_parameter" && !arguments->items.empty()) push(arguments->items[0]);
    else refuse_torch(path_, "would call " + escaped(callee->text) + ", which no dict of tensors needs");
  }

  // Operations that make a value; false for others.
  bool push_value(std::uint8_t op) {
    switch (op) {
      case 'N':
      case 0x88:
      case 0x89:
        return push(make(Kind::none)), true;
      case 'J':
        return push_number(take<std::int32_t>()), true;
      case 'K':
        return push_number(take<std::uint8_t>()), true;
      case 'M':
        return push_number(take<std::uint16_t>()), true;
      case 0x8a:
        return push_long(), true;
      case 'G':  // a floating number, of no tensor
        return take<std::uint64_t>(), push(make(Kind::none)), true;
      case 'X':
        return push(make(Kind::text))->text = take_text(take<std::uint32_t>()), true;
      case 'c': {
        const std::string module = take_line();
        return push(make(Kind::name))->text = module + " " + take_line(), true;
      }
      case '}':
        return push(make(Kind::dict)), true;
      case ')':
      case ']':  // a list, of no tensor
        return push_tuple({}), true;
      default:
        return false;
    }
  }

  // Operations on values that are there.
  bool combine(std::uint8_t op) {
    switch (op) {
      case '(':
        return marks_.push_back(stack_.size()), true;
      case 't':
        return push_tuple(pop_to_mark()), true;
      case 0x85:
      case 0x86:
      case 0x87:
        return push_tuple_of(op - 0x84u), true;
      case 'a':
      case 'b':  // attributes, as the versions of modules
        return pop(), true;
      case 'e':
        return pop_to_mark(), true;
      case 's': {
        Node *value = pop(), *key = pop();
        return set_items({key, value}), true;
      }
      case 'u':
        return set_items(pop_to_mark()), true;
      case 'Q':
        return load_storage(), true;
      case 'R':
        return reduce(), true;
      default:
        return false;
    }
  }

  bool remember_or_recall(std::uint8_t op) {
    switch (op) {
      case 'q':
        return remember(take<std::uint8_t>()), true;
      case 'r':
        return remember(take<std::uint32_t>()), true;
      case 'h':
        return recall(take<std::uint8_t>()), true;
      case 'j':
        return recall(take<std::uint32_t>()), true;
      default:
        return false;
    }
  }

  // One operation; false at the end.
  bool step() {
    const auto op = take<std::uint8_t>();
    if (op == '.') return false;
    if (op == 0x80) take<std::uint8_t>();  // protocol
    else if (!push_value(op) && !combine(op) && !remember_or_recall(op)) damaged();
    return true;
  }

  const std::string &path_, &code_;
  const ZipFile& zip_;
  const std::string& folder_;
  std::size_t at_ = 0;
  std::deque<Node> nodes_;
  std::vector<TensorInfo> made_;
  std::vector<Node*> stack_;
  std::vector<std::size_t> marks_;
  std::map<std::size_t, Node*> memo_;
};

}  // namespace

SafetensorsFile open_torch_file(const std::string& path) {
  const FileReader file(path);
  const ZipFile zip(file);
  constexpr std::string_view pickle = "data.pkl";
  for (const auto& [name, entry] : zip.entries()) {
    if (!name.ends_with(pickle)) continue;
    const std::string folder = name.substr(0, name.size() - pickle.size());
    if (const auto order = zip.entries().find(folder + "byteorder"); order != zip.entries().end())
      if (zip.read(order->second.begin, order->second.size, "byteorder") != "little") refuse_torch(path, "is not little-endian");
    const std::string code = zip.read(entry.begin, entry.size, "pickle");
    return SafetensorsFile::of_tensors(path, Pickle(path, code, zip, folder).run());
  }
  refuse_torch(path, "is no file of torch.save: it has no data.pkl");
}

SafetensorsFile open_either_file(const std::string& folder, const std::string& stem, const std::string& torch_stem) {
  const std::filesystem::path safe = std::filesystem::path(folder) / (stem + ".safetensors"),
                              torch = std::filesystem::path(folder) / (torch_stem + ".bin");
  return !is_there(safe) && is_there(torch) ? open_torch_file(torch.string()) : SafetensorsFile::open(safe.string());
}

}  // namespace kava

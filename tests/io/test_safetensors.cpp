#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstring>
#include <limits>

#include "engine/files/safetensors.h"
#include "tests/folders.h"

using namespace kava;
namespace fs = std::filesystem;

namespace {

std::string file_text(const std::string& header, std::size_t data_bytes) {
  const std::uint64_t n = header.size();
  std::string text(reinterpret_cast<const char*>(&n), 8);
  return text + header + std::string(data_bytes, '\1');
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return fmt::format("\"{}\":{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":{}}}", name, dtype, shape, offsets);
}

// "" where the file opens, else the message; any other exception fails the test.
std::string open_refusal(const std::string& path) {
  try {
    SafetensorsFile::open(path);
  } catch (const Error& e) {
    CHECK(e.code() == Exit::data);
    CHECK(std::string(e.what()).size() < 1000);
    return e.what();
  }
  return "";
}

std::string refusal_of(const TempFolder& folder, const std::string& bytes) {
  overwrite(folder / "x.safetensors", bytes);
  return open_refusal(folder / "x.safetensors");
}

template <class T>
std::vector<T> read_back(const SafetensorsFile& file, const std::string& name, DType type) {
  const TensorInfo* t = file.find(name);
  REQUIRE(t);
  std::vector<T> out(static_cast<std::size_t>(t->count()));
  file.read_as(*t, type, out.data());
  return out;
}

}  // namespace

TEST_CASE("tensors of every floating type come back, converted and rounded once") {
  TempFolder folder;
  const double third = 1.0 / 3, tie = 1 + 0x1p-8;  // tie: half way between two bf16
  // Just above the tie, by less than f32 resolves: rounding by way of f32 would lose it.
  const double above_tie = tie + 0x1p-40;
  const std::vector<double> f64 = {third, -tie, above_tie, -above_tie, 1e300, 0x1p-1060, 0.0, -0.0};
  const std::vector<float> f32 = {1.5f, 0x1p-149f, 3.4e38f, -0.0f};
  const std::vector<std::uint16_t> f16 = {0x3c00, 0x0001, 0x83ff, 0x7bff, 0xfc00, 0x7e00, 0x0400};
  const std::vector<std::uint16_t> bf = {0x3f80, 0x0001, 0x7f7f, 0xff80};
  const std::int64_t whole = -7;
  write_safetensors(folder / "a",
                    {{"f32", "F32", {2, 2}, f32.data()},
                     {"f64", "F64", {8}, f64.data()},
                     {"half", "F16", {7}, f16.data()},
                     {"brain", "BF16", {4}, bf.data()},
                     {"whole", "I64", {}, &whole},
                     {"none", "F32", {0, 5}, nullptr}},
                    {{"made", "by a test"}});
  const auto file = SafetensorsFile::open(folder / "a");
  CHECK(file.metadata() == std::map<std::string, std::string>{{"format", "pt"}, {"made", "by a test"}});
  CHECK(file.tensors().size() == 6);
  CHECK(file.tensors()[0].name == "brain");
  CHECK(!file.find("other"));
  CHECK(file.find("whole")->count() == 1);
  CHECK(file.find("none")->count() == 0);
  CHECK((8 + file.header_text().size()) % 8 == 0);
  for (const TensorInfo& t : file.tensors())
    if (t.count() > 0) CHECK(t.begin % ((t.end - t.begin) / static_cast<std::uint64_t>(t.count())) == 0);

  CHECK(read_back<double>(file, "f64", DType::f64) == f64);
  const auto narrow = read_back<float>(file, "f64", DType::f32);
  CHECK(narrow[0] == static_cast<float>(third));
  CHECK(std::isinf(narrow[4]));
  CHECK((narrow[5] == 0 && std::signbit(narrow[7])));
  const auto brain = read_back<bf16>(file, "f64", DType::bf16);
  CHECK(to_float(brain[1]) == -1.0f);           // ties to even
  CHECK(to_float(brain[2]) == 1.0f + 0x1p-7f);  // not double rounding
  CHECK(to_float(brain[3]) == -(1.0f + 0x1p-7f));
  CHECK(read_back<float>(file, "f32", DType::f32) == f32);
  CHECK(read_back<double>(file, "f32", DType::f64)[1] == 0x1p-149);
  CHECK(std::isinf(to_float(read_back<bf16>(file, "f32", DType::bf16)[2])));
  const auto half = read_back<float>(file, "half", DType::f32);
  CHECK(half[0] == 1.0f);
  CHECK(half[1] == 0x1p-24f);
  CHECK(half[2] == -1023 * 0x1p-24f);
  CHECK(half[3] == 65504.0f);
  CHECK((std::isinf(half[4]) && half[4] < 0));
  CHECK(std::isnan(half[5]));
  CHECK(half[6] == 0x1p-14f);
  const auto same = read_back<bf16>(file, "brain", DType::bf16);
  CHECK(std::memcmp(same.data(), bf.data(), 8) == 0);
  CHECK_THROWS_AS(read_back<float>(file, "whole", DType::f32), Error);
  std::int64_t raw = 0;
  file.read(*file.find("whole"), &raw);
  CHECK(raw == whole);
}

TEST_CASE("every half-precision number is converted as its definition says") {
  std::vector<std::uint16_t> all(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  TempFolder folder;
  write_safetensors(folder / "a", {{"x", "F16", {65536}, all.data()}});
  const auto file = SafetensorsFile::open(folder / "a");
  const auto got = read_back<double>(file, "x", DType::f64);
  for (std::size_t i = 0; i < all.size(); ++i) {
    const int exponent = (all[i] >> 10) & 31, fraction = all[i] & 1023;
    double expected = exponent == 0 ? fraction * 0x1p-24 : std::ldexp(1024 + fraction, exponent - 25);
    if (exponent == 31) expected = fraction ? std::nan("") : std::numeric_limits<double>::infinity();
    if (all[i] & 0x8000) expected = -expected;
    if (std::isnan(expected) ? !std::isnan(got[i]) : got[i] != expected) FAIL("half " << i << " read as " << got[i]);
  }
}

TEST_CASE("a NaN or infinity is refused by name where finite numbers are asked for, also one that rounding makes") {
  TempFolder folder;
  // Longer than one chunk, with the fault in the second.
  std::vector<float> values(400'000, 1.0f);
  const auto check = [&](float bad, DType type, bool refused) {
    values[399'999] = bad;
    write_safetensors(folder / "a", {{"long", "F32", {400'000}, values.data()}});
    const auto file = SafetensorsFile::open(folder / "a");
    std::vector<double> out(400'000);
    std::string message;
    try {
      file.read_as(*file.find("long"), type, out.data(), true);
    } catch (const Error& e) {
      message = e.what();
    }
    CHECK((message.find("\"long\"") != std::string::npos) == refused);
  };
  for (DType type : {DType::f32, DType::bf16, DType::f64}) {
    check(std::nanf(""), type, true);
    check(-std::numeric_limits<float>::infinity(), type, true);
    check(3.4e38f, type, type == DType::bf16);
    check(3.3e38f, type, false);
  }
}

TEST_CASE("headers that the format allows are accepted") {
  TempFolder folder;
  const std::string a = entry("a", "F32", "[2]", "[0,8]");
  CHECK(refusal_of(folder, file_text("{}", 0)) == "");
  CHECK(refusal_of(folder, file_text("\t\n{}\r ", 0)) == "");
  CHECK(refusal_of(folder, file_text("{" + a + "}      ", 8)) == "");
  CHECK(refusal_of(folder, file_text("{" + entry("b", "U8", "[]", "[8,9]") + "," + a + "}", 9)) == "");
  CHECK(refusal_of(folder, file_text("{" + entry("z", "F32", "[0]", "[0,0]") + "," + a + "," + entry("y", "F64", "[3,0]", "[8,8]") + "}",
                                     8)) == "");
  CHECK(refusal_of(folder, file_text("{" + entry("z", "F32", "[0,9223372036854775807,4]", "[0,0]") + "}", 0)) == "");
  CHECK(refusal_of(folder, file_text("{" + entry("z", "F4", "[2]", "[0,1]") + "}", 1)) == "");
  CHECK(refusal_of(folder, file_text("{\"__metadata__\":{\"format\":\"pt\"}," + a + "}", 8)) == "");
  CHECK(refusal_of(folder, file_text("{\"__metadata__\":null," + a + "}", 8)) == "");
}

TEST_CASE("every malformed file is one clear error") {
  TempFolder folder;
  const std::string a = entry("a", "F32", "[2]", "[0,8]");
  const auto with = [](const std::string& second) { return fmt::format("{{{},{}}}", entry("a", "F32", "[2]", "[0,8]"), second); };
  const std::string long_name(100'000, 'n');
  std::string many_dims = "[2";
  for (int i = 0; i < 64; ++i) many_dims += ",1";
  struct Case {
    std::string header;
    std::size_t data;
  };
  const Case cases[] = {
      {"{" + entry("a", "F32", many_dims + "]", "[0,8]") + "}", 8},
      {"", 0},
      {" ", 0},
      {"[]", 0},
      {"null", 0},
      {"{", 0},
      {"{}}", 0},
      {std::string("{}\0", 3), 0},
      {"\xEF\xBB\xBF{}", 0},
      {std::string(3, '\0'), 0},
      {"{}", 1},
      {"{" + a + "}", 7},
      {"{" + a + "}", 9},
      {"{" + a + "}", 0},
      {"{\"a\xff\":1}", 0},
      {"{\"a\\ud800\":1}", 0},
      {with(entry("a", "F32", "[2]", "[8,16]")), 16},
      {with(entry("a", "F32", "[2]", "[0,8]")), 8},  // the name twice
      {with(entry("b", "F32", "[2]", "[0,8]")), 8},
      {with(entry("b", "F32", "[2]", "[4,12]")), 12},  // overlap
      {with(entry("b", "F32", "[2]", "[12,20]")), 20},
      {"{" + entry("b", "F32", "[2]", "[4,12]") + "}", 12},  // gap
      {with(entry("b", "F32", "[2]", "[16,8]")), 8},
      {with(entry("b", "F32", "[0]", "[16,16]")), 8},
      {with(entry("b", "F32", "[2]", "[-8,0]")), 8},
      {with(entry("b", "F32", "[2]", "[8]")), 16},
      {with(entry("b", "F32", "[2]", "[8,16,24]")), 16},
      {with(entry("b", "F32", "[2]", "[8.0,16.0]")), 16},
      {with(entry("b", "F32", "[2]", "[8,\"16\"]")), 16},
      {with(entry("b", "F32", "[2]", "8")), 16},
      {with(entry("b", "F32", "[2]", "[8,18446744073709551616]")), 16},
      {with(entry("b", "F32", "[2]", "[18446744073709551608,18446744073709551615]")), 16},
      {with(entry("b", "F32", "[3]", "[8,16]")), 16},
      {with(entry("b", "F32", "[]", "[8,16]")), 16},
      {with(entry("b", "F32", "[-2]", "[8,16]")), 16},
      {with(entry("b", "F32", "[2.0]", "[8,16]")), 16},
      {with(entry("b", "F32", "[true,2]", "[8,16]")), 16},
      {with(entry("b", "F32", "[[2]]", "[8,16]")), 16},
      {with(entry("b", "F32", "2", "[8,16]")), 16},
      {with(entry("b", "F32", "[1e9]", "[8,16]")), 16},
      {with(entry("b", "F32", "null", "[8,16]")), 16},
      {with(entry("b", "F32", "[4294967296,4294967296]", "[8,8]")), 8},
      {with(entry("b", "F32", "[4611686018427387904]", "[8,8]")), 8},
      {with(entry("b", "F32", "[9223372036854775807,9223372036854775807,0]", "[8,8]")), 8},
      {with(entry("b", "F32", "[9223372036854775808]", "[8,8]")), 8},
      {with(entry("b", "F32", "[1000000000000]", "[8,4000000000008]")), 16},
      {with(entry("b", "f32", "[2]", "[8,16]")), 16},
      {with(entry("b", "F31", "[2]", "[8,16]")), 16},
      {with(entry("b", "", "[2]", "[8,16]")), 16},
      {with(entry("b", "F4", "[3]", "[8,9]")), 9},
      {with(entry("b", long_name, "[2]", "[8,16]")), 16},
      {with(entry(long_name, "X", "[2]", "[8,16]")), 16},
      {with("\"b\":{\"dtype\":7,\"shape\":[2],\"data_offsets\":[8,16]}"), 16},
      {with("\"b\":{\"dtype\":\"F32\",\"shape\":[2]}"), 16},
      {with("\"b\":{\"dtype\":\"F32\",\"data_offsets\":[8,16]}"), 16},
      {with("\"b\":{\"shape\":[2],\"data_offsets\":[8,16]}"), 16},
      {with("\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16],\"x\":1}"), 16},
      {with("\"b\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}"), 16},
      {with("\"b\":null"), 8},
      {with("\"b\":[]"), 8},
      {with("\"b\":{}"), 8},
      {with("\"__metadata__\":[]"), 8},
      {with("\"__metadata__\":{\"a\":1}"), 8},
      {with("\"__metadata__\":{\"a\":null}"), 8},
      {with("\"__metadata__\":{\"a\":{\"b\":\"c\"}}"), 8},
      {with("\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}"), 8},
      {with("\"b\":" + std::string(100'000, '[')), 8},
  };
  for (const Case& c : cases) {
    CAPTURE(c.header.substr(0, 200), c.data);
    CHECK(refusal_of(folder, file_text(c.header, c.data)) != "");
  }
}

TEST_CASE("a header length that lies is refused before anything is read by it") {
  TempFolder folder;
  const std::string good = file_text(fmt::format("{{{}}}", entry("a", "F32", "[2]", "[0,8]")), 8);
  CHECK(refusal_of(folder, good) == "");
  for (std::uint64_t n : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{good.size() - 7}, std::uint64_t{100'000'000},
                          std::uint64_t{100'000'001}, std::uint64_t{1} << 62, ~std::uint64_t{0}, ~std::uint64_t{7}}) {
    std::string bad = good;
    std::memcpy(bad.data(), &n, 8);
    CAPTURE(n);
    CHECK(refusal_of(folder, bad) != "");
  }
}

TEST_CASE("a header of more values than any model has is refused before it is parsed") {
  TempFolder folder;
  std::string shape = "[1";
  for (int i = 0; i < 5'000'000; ++i) shape += ",1";
  CHECK(refusal_of(folder, file_text(fmt::format("{{{}}}", entry("a", "U8", shape + "]", "[0,1]")), 1)).find("values") !=
        std::string::npos);
}

TEST_CASE("a file cut off at any byte is refused") {
  TempFolder folder;
  const std::string good = file_text("{" + entry("a", "F32", "[2]", "[0,8]") + "," + entry("b", "I8", "[3]", "[8,11]") + "}", 11);
  for (std::size_t n = 0; n < good.size(); ++n) {
    CAPTURE(n);
    CHECK(refusal_of(folder, good.substr(0, n)) != "");
  }
}

TEST_CASE("no change of one byte in the header is more than an error or another well-formed file") {
  TempFolder folder;
  const std::string good = file_text(
      "{\"__metadata__\":{\"format\":\"pt\"}," + entry("a", "F32", "[2]", "[0,8]") + "," + entry("b", "I8", "[3]", "[8,11]") + "}", 11);
  int refused = 0;
  for (std::size_t i = 0; i + 11 < good.size(); ++i)
    for (int mask : {1, 2, 16, 128}) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ mask);
      refused += refusal_of(folder, bad) != "";
    }
  CHECK(refused > 300);
}

TEST_CASE("writing safetensors to a full device is an error of writing, and the older file stays when the folder is gone") {
  const float x = 1;
  try {
    write_safetensors("/dev/full", {{"x", "F32", {1}, &x}});
    FAIL("no error");
  } catch (const Error& e) {
    CHECK(e.code() == Exit::write);
  }
  CHECK_THROWS_AS(write_safetensors("/nonexistent/folder/x", {{"x", "F32", {1}, &x}}), Error);
  TempFolder folder;
  CHECK_THROWS_AS(write_safetensors(folder / "x", {{"x", "F32", {1}, &x}, {"x", "U8", {1}, &x}}), Error);
  CHECK(fs::is_empty(folder.path()));
}

TEST_CASE("the real weights of stories260k are read") {
  const std::string path = shared_data("data/models/stories260k/model.safetensors");
  if (path.empty()) SKIP("no shared data");
  const auto file = SafetensorsFile::open(path);
  CHECK(file.tensors().size() == 47);
  CHECK(file.metadata().at("format") == "pt");
  const auto embedding = read_back<float>(file, "model.embed_tokens.weight", DType::f32);
  CHECK(embedding.size() == 512 * 64);
  double squares = 0;
  for (float x : embedding) squares += double(x) * x;
  CHECK(squares > 0);
  CHECK(std::isfinite(squares));
}

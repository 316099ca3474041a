#include "engine/libraries.h"

#include <fmt/format.h>
#include <openssl/crypto.h>
#include <utf8proc.h>

#include <nlohmann/json.hpp>

#ifdef KAVA_ONEDNN
#include <dnnl.hpp>
#endif

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace kava {

namespace {

std::string pcre2_version() {
  char text[64] = {};
  pcre2_config(PCRE2_CONFIG_VERSION, text);
  const std::string version = text;
  return version.substr(0, version.find(' '));  // before the date
}

std::string products() {
#ifdef KAVA_ONEDNN
  const dnnl_version_t* v = dnnl_version();
  return fmt::format("oneDNN {}.{}.{}", v->major, v->minor, v->patch);
#else
  return "no oneDNN";
#endif
}

}  // namespace

std::string libraries_text() {
  return fmt::format("{}, OpenSSL {}, PCRE2 {}, utf8proc {}, fmt {}.{}.{}, nlohmann json {}.{}.{}", products(),
                     OpenSSL_version(OPENSSL_VERSION_STRING), pcre2_version(), utf8proc_version(), FMT_VERSION / 10000,
                     FMT_VERSION / 100 % 100, FMT_VERSION % 100, NLOHMANN_JSON_VERSION_MAJOR, NLOHMANN_JSON_VERSION_MINOR,
                     NLOHMANN_JSON_VERSION_PATCH);
}

}  // namespace kava

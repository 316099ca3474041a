// SHA-256, a piece at a time.
#pragma once
#include <openssl/evp.h>

#include <cstddef>
#include <memory>
#include <string>

#include "engine/error.h"

namespace kava {

class Digest {
 public:
  Digest() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    KAVA_CHECK(context_ && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1, "SHA-256 is not available");
  }
  void add(const void* bytes, std::size_t count) { KAVA_CHECK(EVP_DigestUpdate(context_.get(), bytes, count) == 1, "SHA-256 failed"); }
  std::string hex() {
    unsigned char bytes[EVP_MAX_MD_SIZE];
    unsigned count = 0;
    KAVA_CHECK(EVP_DigestFinal_ex(context_.get(), bytes, &count) == 1, "SHA-256 failed");
    std::string out;
    for (unsigned i = 0; i < count; ++i) out += fmt::format("{:02x}", bytes[i]);
    return out;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

}  // namespace kava

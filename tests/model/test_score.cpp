#include <catch2/catch_test_macros.hpp>
#include <string>

#include "models/score.h"

using namespace kava;

TEST_CASE("strict compares text without commas and outer space") {
  CHECK(strict_match("18", "18"));
  CHECK(strict_match(" 1,234\n", "1234"));
  CHECK(strict_match("1234", "1,234 "));
  CHECK_FALSE(strict_match("18.0", "18"));
  CHECK_FALSE(strict_match("18.", "18"));
  CHECK_FALSE(strict_match("1 8", "18"));
  CHECK_FALSE(strict_match("$18", "18"));
  CHECK_FALSE(strict_match("", "18"));
  CHECK_FALSE(strict_match("-18", "18"));
}

TEST_CASE("raw compares the bytes") {
  CHECK(raw_match("1,234", "1,234"));
  CHECK_FALSE(raw_match("1234", "1,234"));
  CHECK_FALSE(raw_match(" 18", "18"));
  CHECK_FALSE(raw_match("", "18"));
}

TEST_CASE("the last number is found as CODI's expression finds it") {
  CHECK(last_number("18") == 18);
  CHECK(last_number("It is 3, then 1,234.50.") == 1234.5);
  CHECK(last_number("18.") == 18);
  CHECK(last_number("costs $-5") == -5);
  CHECK(last_number("16-3-4") == -4);
  CHECK(last_number("5 - 3") == 3);
  CHECK(last_number("--7") == -7);
  CHECK(last_number("-.5") == 5);
  CHECK(last_number("1.2.3") == 3);
  CHECK(last_number("1.5e3") == 3);
  CHECK(last_number("7%") == 7);
  CHECK(last_number("1,2") == 12);
  CHECK(last_number("0x1F") == 1);
  CHECK(last_number("x9999999999999") == 9999999999999.0);
  CHECK_FALSE(last_number(""));
  CHECK_FALSE(last_number("none, - . ,"));
  CHECK_FALSE(last_number("\xd9\xa3"));  // an Arabic digit
  CHECK_FALSE(last_number(std::string(400, '9')));
  CHECK(last_number("0." + std::string(5000, '0') + "1") == 0);
  CHECK(last_number(std::string("1\0002", 3)) == 2);
}

TEST_CASE("25 texts give what CODI's rule gives in Python") {
  // [float(x) for x in re.findall(r"-?\d+\.?\d*", text.replace(",", ""))][-1]
  const std::pair<const char*, double> texts[] = {{"18", 18.0},
                                                  {"It is 3, then 1,234.50.", 1234.5},
                                                  {"18.", 18.0},
                                                  {"costs $-5", -5.0},
                                                  {"costs -$5", 5.0},
                                                  {"\xE2\x88\x92"
                                                   "5",
                                                   5.0},
                                                  {"- 5", 5.0},
                                                  {"16-3-4", -4.0},
                                                  {"5 - 3", 3.0},
                                                  {"--7", -7.0},
                                                  {"-.5", 5.0},
                                                  {"1.2.3", 3.0},
                                                  {"1.5e3", 3.0},
                                                  {"7%", 7.0},
                                                  {"1,2", 12.0},
                                                  {"0x1F", 1.0},
                                                  {"The answer is: 42", 42.0},
                                                  {"####  -12", -12.0},
                                                  {"$1,000.00 in all", 1000.0},
                                                  {"x=-0", -0.0},
                                                  {"3/4", 4.0},
                                                  {"10:30", 30.0},
                                                  {"a1b2c3", 3.0},
                                                  {"-1-", -1.0},
                                                  {"9 apples, no pears", 9.0}};
  for (const auto& [text, number] : texts) {
    CAPTURE(text);
    CHECK(last_number(text) == number);
    CHECK(codi_match(text, std::to_string(number)));
  }
}

TEST_CASE("gsm8k and gsm_hard read a sign that blanks and a currency sign part from its digits") {
  for (const char* text : {"-5", "- 5", "-$5", "- $5", "-$ 5", "- $ 5", "$-5", "$ -5", "-\\$5",
                           "\xE2\x88\x92"
                           "5",
                           "\xE2\x88\x92 $5", "\xE2\x88\x92\t5",
                           "-\xE2\x82\xAC"
                           "5",
                           "-\xC2\xA3 5",
                           "-\xC2\xA0"
                           "5",
                           "-5.0", "-$5.00 left"}) {
    CAPTURE(text);
    CHECK(gsm8k_match(std::string("#### ") + text, "-5"));
    CHECK_FALSE(gsm8k_match(std::string("#### ") + text, "5"));
    CHECK(gsm_hard_match(text, "-5"));
    CHECK_FALSE(gsm_hard_match(text, "5"));
    CHECK(gsm8k_match("#### -5", text));
  }
  for (const char* text : {"$5", "$ 5", "5",
                           "\xE2\x82\xAC"
                           "5",
                           "-, x5", "-%5", "-.5", "-\n5",
                           "\xE2\x82\x99"
                           "5"}) {
    CAPTURE(text);
    CHECK(gsm8k_match(std::string("#### ") + text, "5"));
    CHECK(gsm_hard_match(text, "5"));
  }
  CHECK(gsm_hard_match("-$9,284,017,268,534.4", "-9284017268534.4"));
  CHECK_FALSE(strict_match("-$5", "-5"));
  CHECK(codi_match("-$5", "5"));
}

TEST_CASE("CODI's test compares the last numbers as doubles") {
  CHECK(codi_match("so 1,000.0", "1000"));
  CHECK(codi_match("18.00", "18"));
  CHECK(codi_match("-3", "-3.0"));
  CHECK_FALSE(codi_match("3", "-3"));
  CHECK_FALSE(codi_match("18 or 19", "18"));
  CHECK_FALSE(codi_match("no number", "18"));
  CHECK_FALSE(codi_match("no number", "none"));
  CHECK_FALSE(codi_match("0.30000001", "0.3"));
}

TEST_CASE("a written chain is judged behind its last mark") {
  CHECK(gsm8k_match("<<9*2=18>>The answer is:18", "18"));
  CHECK(gsm8k_match("The answer is: $1,234.00.", "1234"));
  CHECK(gsm8k_match("#### 7\n#### 18 dollars for 3 days", "18"));
  CHECK(gsm8k_match("The answer is: 7 #### 18", "18"));
  CHECK(gsm8k_match("#### 7 The answer is: 18", "18"));
  CHECK(gsm8k_match("#### -5", "-5"));
  CHECK_FALSE(gsm8k_match("#### 5", "-5"));
  CHECK_FALSE(gsm8k_match("18", "18"));
  CHECK_FALSE(gsm8k_match("18 The answer is:", "18"));
  CHECK_FALSE(gsm8k_match("The answer is: none", "18"));
  CHECK_FALSE(gsm8k_match("the answer is: 18", "18"));
}

TEST_CASE("GSM-Hard allows one part in a million") {
  CHECK(gsm_hard_match("9284017268534.4", "9284017268534.4"));
  CHECK(gsm_hard_match("9284017268534", "9284017268534.4"));
  CHECK(gsm_hard_match("1000001", "1000000"));
  CHECK_FALSE(gsm_hard_match("1000002", "1000000"));
  CHECK(gsm_hard_match("-14,053,029.67", "-14053029.666666666"));
  CHECK_FALSE(gsm_hard_match("14053029.67", "-14053029.666666666"));
  CHECK(gsm_hard_match("0", "0"));
  CHECK_FALSE(gsm_hard_match("0.0000001", "0"));
  CHECK_FALSE(gsm_hard_match("", "0"));
}

TEST_CASE("the answer of a chain is what follows the last prompt") {
  CHECK(answer_of_chain("x The answer is: 1 The answer is: 2 \n", "The answer is:") == "2");
  CHECK(answer_of_chain("The answer is:", "The answer is:") == "");
  CHECK_FALSE(answer_of_chain("the answer", "The answer is:"));
  CHECK(answer_of_chain(" 5 ", "") == "5");
}

// What a person is told of keys: which there are, and what a name or a word that is none was meant to be, by its meaning in the field's
// other programs, else by its letters.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace kava {

/// Every key with its default and its range, one a line.
std::string key_list();

/// What to write in place of a key that is none: "the nearest valid key is train.lr", "the option --out does this".
std::string remedy_for_key(const std::string& name);

/// The same for a section: "the nearest valid section is [train]".
std::string remedy_for_section(const std::string& name);

/// The remedy for an option that is none of a program that has these, and takes keys by --set or not: "write --set train.lr=VALUE",
/// "the nearest option is --limit"; empty where none is near.
std::string remedy_for_option(const std::string& name, const std::vector<std::string>& options, bool takes_keys);

/// What to give in place of a word that is none of `words`: "give \"bf16\" (one of bf16, f32, f64)".
std::string remedy_for_word(const std::string& word, const std::vector<std::string>& words);

/// The same of lora.targets, whose words are linears.
std::string remedy_for_target(const std::string& word, const std::vector<std::string>& words);

}  // namespace kava

// Results in the layout of EleutherAI's lm-evaluation-harness (0.4.13), for what reads its files: a folder with a summary and, for each
// data file, one JSON object a line for each question and scorer.
#pragma once
#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "models/evaluate.h"

namespace kava {

/// What the files say beside the results.
struct SampleFilesHeader {
  std::string model, device;            // as they were named
  Json settings;                        // of the evaluation, by option
  std::string chat_before, chat_after;  // text around each question
  std::string eos;                      // the token that ends an answer; "" where it has no text
  std::chrono::system_clock::time_point date;
};

/// Error(code usage, preflight) where the files of this model could not be written below OUT. Makes nothing.
void require_sample_folder(const std::string& out, const std::string& model);

/// Writes OUT/MODEL/results_DATE.json and OUT/MODEL/samples_TASK_DATE.jsonl, one for each result, whole or not at all each; MODEL is the
/// model's name with runs of the characters "<>:/|\?*[] made "__", TASK the data file's stem with all but letters, digits and _ made _.
/// Returns the paths. Error(code write).
std::vector<std::string> write_sample_files(const std::string& out, const SampleFilesHeader& header,
                                            const std::vector<std::pair<std::string, EvalResult>>& results);

}  // namespace kava

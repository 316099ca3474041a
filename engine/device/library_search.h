// Where a library of NVIDIA's may lie on this machine: those of CUDA come with the toolkit or with a Python environment's packages.
#pragma once
#include <functional>
#include <string>
#include <vector>

namespace kava {

/// Places to load `name` ("libcublasLt.so.13") from, in the order in which they are tried: as the system finds it, then the toolkit
/// (CUDA_PATH, CUDA_HOME, /usr/local/cuda and its versions), then the nvidia packages of Python environments: that of the interpreter
/// KAVA_PYTHON, those that are active, those on PATH. But for the first, only files that are there. `environment` is like getenv.
std::vector<std::string> library_places(const std::string& name, const std::function<const char*(const char*)>& environment);

/// dlopen's handle of the first of these places that holds it, with getenv; null: none does.
void* open_library(const std::string& name);

}  // namespace kava

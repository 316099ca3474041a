// Modules of the engine that are loaded at run time: shared libraries beside its own.
#pragma once
#include <string>

namespace kava {

struct LoadedModule {
  void* library = nullptr;  // never unloaded
  std::string why;          // it, or what was last asked of it, is not there

  /// The address of an exported name; nullptr, with `why`, where there is none.
  void* find(const char* name);
};

/// Loads it, or tells why that cannot be. everywhere: its symbols, and those of what it links, serve later libraries too.
LoadedModule load_module(const std::string& file, bool everywhere = false);

}  // namespace kava

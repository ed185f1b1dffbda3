// The fields of an argument struct by name: written once, in the struct, and read by all that fill
// one in, which are bindings.cpp and the drivers of the tests.
#pragma once

#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "core/types.h"

// Comes last in a struct: FF_FIELDS(x, strides, left.rows); a field of a member is named left_rows.
#define FF_FIELDS(...)                                 \
  static constexpr const char* kFields = #__VA_ARGS__; \
  auto fields() { return std::tie(__VA_ARGS__); }

namespace fisherfast {

template <typename Args>
std::vector<std::string> field_names() {
  std::vector<std::string> names;
  std::istringstream words(Args::kFields);
  for (std::string name; std::getline(words >> std::ws, name, ',');) {
    for (char& letter : name) letter = letter == '.' ? '_' : letter;
    names.push_back(name);
  }
  return names;
}

// Calls visit(name, field) for every field of args, in order.
template <typename Args, typename Visit>
void for_each_field(Args& args, Visit&& visit) {
  static const std::vector<std::string> names = field_names<Args>();
  auto name = names.begin();
  std::apply([&](auto&... field) { (visit(*name++, field), ...); }, args.fields());
}

// Bytes of `args.workspace` on the device; an op that needs one has an overload.
template <typename Args>
index_t workspace_bytes(const Args&) {
  return 0;
}

}  // namespace fisherfast

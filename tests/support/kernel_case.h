// One call of a kernel, as tests/support/kernel_calls.py writes it: the fields of its argument
// struct by name.
//
//   op NAME | dtype NAME | number NAME VALUE... | alias NAME OTHER | SETTING VALUES...
//   array NAME BYTES OFFSET                                one a line; its bytes follow
//   end
#pragma once

#include <cstring>
#include <istream>
#include <map>
#include <memory>
#include <ostream>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "core/fields.h"

// An array is a heap allocation of exactly its size, so that AddressSanitizer sees an access one
// element outside.
struct Bytes {
  std::unique_ptr<char[]> memory;
  std::size_t size = 0;
  std::size_t offset = 0;  // of the first element, to test addresses that are not aligned

  Bytes(std::size_t size_, std::size_t offset_)
      : memory(new char[size_ + offset_]), size(size_), offset(offset_) {
    std::memset(memory.get(), 0xff,
                size + offset);  // NaN: an element that no thread writes is seen
  }
  char* data() const { return memory.get() + offset; }
};

struct Case {
  std::string op, dtype;
  std::map<std::string, std::vector<double>> numbers;
  std::map<std::string, std::string> aliases;   // fields that point to the array of another field
  std::map<std::string, std::string> settings;  // all other lines
  std::map<std::string, Bytes> arrays;

  // False at the end of the stream.
  bool read(std::istream& in) {
    *this = Case();
    std::string line;
    while (std::getline(in, line)) {
      std::istringstream words(line);
      std::string kind, name;
      words >> kind >> name;
      if (kind == "end") return true;
      if (kind == "op") {
        op = name;
      } else if (kind == "dtype") {
        dtype = name;
      } else if (kind == "number") {
        for (std::string number; words >> number;) numbers[name].push_back(std::stod(number));
      } else if (kind == "alias") {
        words >> aliases[name];
      } else if (kind == "array") {
        std::size_t size = 0, offset = 0;
        words >> size >> offset;
        in.read(arrays.emplace(name, Bytes(size, offset)).first->second.data(),
                static_cast<std::streamsize>(size));
      } else {
        settings[kind] = line.substr(kind.size());
      }
    }
    return false;
  }
};

// The argument struct of one run of a case, with copies of its arrays.
template <typename Args>
class Run {
 public:
  explicit Run(const Case& call) : call_(call) {
    for (const auto& [name, bytes] : call.arrays) {
      const Bytes& copy = arrays_.emplace(name, Bytes(bytes.size, bytes.offset)).first->second;
      std::memcpy(copy.data(), bytes.data(), bytes.size);
    }
    fisherfast::for_each_field(args,
                               [this](const std::string& name, auto& field) { set(name, field); });
  }

  // Gives the kernel its scratch memory on the device.
  void add_workspace() {
    using fisherfast::workspace_bytes;
    const auto size = static_cast<std::size_t>(workspace_bytes(args));
    arrays_.insert_or_assign("workspace", Bytes(size, 0));
    fisherfast::for_each_field(args, [this](const std::string& name, auto& field) {
      if (name == "workspace") set(name, field);
    });
    written_.erase("workspace");
  }

  // The arrays that the kernel may write to.
  void write(std::ostream& out) const {
    for (const std::string& name : written_) {
      const Bytes& bytes = arrays_.at(name);
      out << "array " << name << ' ' << bytes.size << '\n';
      out.write(bytes.data(), static_cast<std::streamsize>(bytes.size));
    }
    out << "end\n";
  }

  Args args{};

 private:
  template <typename T>
  void set(const std::string& name, T*& field) {
    const auto alias = call_.aliases.find(name);
    const auto found = arrays_.find(alias == call_.aliases.end() ? name : alias->second);
    if (found == arrays_.end()) return;  // null
    field = reinterpret_cast<T*>(found->second.data());
    if (!std::is_const_v<T>) written_.insert(found->first);
  }
  template <typename T, std::size_t n>
  void set(const std::string& name, T (&field)[n]) {
    for (std::size_t i = 0; i < n; ++i) field[i] = static_cast<T>(call_.numbers.at(name).at(i));
  }
  template <typename T>
  void set(const std::string& name, T& field) {
    field = static_cast<T>(call_.numbers.at(name).at(0));
  }

  const Case& call_;
  std::map<std::string, Bytes> arrays_;
  std::set<std::string> written_;
};

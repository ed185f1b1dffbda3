// One call of a launcher, as it comes from the tests: numbers, input arrays, and output arrays.
//
// Every array is a heap allocation of exactly its size, so that AddressSanitizer sees an access one
// element outside. Outputs start as NaN bytes: an element that no thread writes is seen too.
#pragma once

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace cuda_host {

struct Bytes {
  std::unique_ptr<char[]> memory;
  std::size_t offset = 0;  // of the first element, to test addresses that are not aligned
  std::size_t size = 0;

  Bytes() = default;
  Bytes(std::size_t size_, std::size_t offset_)
      : memory(new char[size_ + offset_]), offset(offset_), size(size_) {}
  char* data() const { return memory.get() + offset; }
};

class Case {
 public:
  std::string op, dtype;
  std::vector<std::string> orders;
  std::map<std::string, double> numbers;
  std::map<std::string, Bytes> inputs;
  std::map<std::string, Bytes> outputs;

  long long number(const std::string& name) const {
    return static_cast<long long>(numbers.at(name));
  }
  bool flag(const std::string& name) const { return numbers.count(name) && numbers.at(name) != 0; }

  // Null where the test passes no such array.
  template <typename T>
  const T* input(const std::string& name) const {
    const auto found = inputs.find(name);
    return found == inputs.end() ? nullptr : reinterpret_cast<const T*>(found->second.data());
  }

  template <typename T>
  T* output(const std::string& name, long long count) {
    Bytes bytes(count * sizeof(T), 0);
    std::memset(bytes.data(), 0xff, bytes.size);
    return reinterpret_cast<T*>(
        outputs.insert_or_assign(name, std::move(bytes)).first->second.data());
  }

  // An output that starts as the input of that name: for what is added to in place.
  template <typename T>
  T* updated(const std::string& name) {
    const Bytes& source = inputs.at(name);
    T* target = output<T>(name, source.size / sizeof(T));
    std::memcpy(target, source.data(), source.size);
    return target;
  }
};

// Calls the launcher `op` with T = dtype. One definition for the ops of csrc/, one for the faults.
bool run_op(Case& call);
bool run_fault(Case& call);

}  // namespace cuda_host

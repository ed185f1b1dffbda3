// Reads one case from standard input, runs it in every order asked for, writes the results to
// standard output. harness.py is the other end.
//
//   op NAME | dtype NAME | orders NAME... | number NAME VALUE | limit BYTES | grid X YZ
//   array NAME BYTES OFFSET                                      one a line; its bytes follow
//   end
#include <cstdio>
#include <exception>
#include <iostream>
#include <sstream>

#include "case.h"
#include "core/cuda/cuda.cuh"
#include "scheduler.h"

namespace {

using cuda_host::Bytes;
using cuda_host::Case;

Case read_case(std::istream& in) {
  Case call;
  std::string line;
  while (std::getline(in, line) && line != "end") {
    std::istringstream words(line);
    std::string kind, name;
    words >> kind >> name;
    if (kind == "op") call.op = name;
    if (kind == "dtype") call.dtype = name;
    if (kind == "limit") cuda_host::set_dynamic_limit(std::stoi(name));
    if (kind == "grid") {
      fisherfast::kMaxGridX = std::stoi(name);
      words >> fisherfast::kMaxGridYZ;
    }
    if (kind == "number") words >> call.numbers[name];
    if (kind == "orders") {
      do call.orders.push_back(name);
      while (words >> name);
    }
    if (kind == "array") {
      std::size_t size = 0, offset = 0;
      words >> size >> offset;
      Bytes bytes(size, offset);
      in.read(bytes.data(), static_cast<std::streamsize>(size));
      call.inputs.insert_or_assign(name, std::move(bytes));
    }
  }
  return call;
}

void write_outputs(const Case& call, std::ostream& out) {
  for (const auto& [name, bytes] : call.outputs) {
    out << "array " << name << ' ' << bytes.size << '\n';
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size));
  }
  out << "end\n";
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  try {
    Case call = read_case(std::cin);
    for (const std::string& order : call.orders) {
      cuda_host::set_order(order);
      call.outputs.clear();
      if (!cuda_host::run_op(call) && !cuda_host::run_fault(call)) {
        std::cerr << "op must be known, got " << call.op << '\n';
        return 2;
      }
      write_outputs(call, std::cout);
    }
  } catch (const std::exception& error) {
    std::cerr << "raised: " << error.what() << '\n';
    return 2;
  }
  return 0;
}

// Checks that throw. Python sees std::invalid_argument as ValueError, std::runtime_error as
// RuntimeError. Shapes and dtypes are checked in Python, once; what is left here is what only the
// native side knows.
#pragma once

#include <sstream>
#include <stdexcept>

// FF_CHECK(d <= limit, "d must be at most " << limit << ", got " << d);
#define FF_CHECK(condition, message)                    \
  do {                                                  \
    if (!(condition)) {                                 \
      std::ostringstream ff_check_text;                 \
      ff_check_text << message;                         \
      throw std::invalid_argument(ff_check_text.str()); \
    }                                                   \
  } while (false)

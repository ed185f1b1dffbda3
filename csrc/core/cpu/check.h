// Checks that throw. In Python std::invalid_argument becomes ValueError, std::runtime_error as
// RuntimeError. Shapes and dtypes are checked in Python, once; the native side checks the
// rest.
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

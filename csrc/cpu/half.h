// The types of 16 bits, by the names that with_element_type (dispatch.h) has for them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace clce::cpu {

using BFloat16 = c10::BFloat16;
using Float16 = c10::Half;

}  // namespace clce::cpu

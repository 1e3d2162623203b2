#include "cpu/rows.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/half.h"
#include "cpu/schedule.h"
#include "dispatch.h"

namespace clce::cpu {
namespace {

constexpr int64_t kGrain = 64;  // a thread takes so many rows at least

template <class In, class T>
void gather_as(const Order& order, const In* in, int64_t stride, T* out) {
  torch::stable::parallel_for(0, order.size(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const In* from = in + order.source[i] * stride;
      T* to = out + i * stride;
      for (int64_t d = 0; d < stride; ++d) to[d] = static_cast<T>(from[d]);
    }
  });
}

}  // namespace

Order order_by_label(const int64_t* labels, int64_t rows, int64_t views, int64_t ignore_index) {
  // Pairs, so that comparing reads what lies side by side; the row as second key keeps ties in order.
  std::vector<std::pair<int64_t, int64_t>> label_and_row;
  label_and_row.reserve(rows);
  int64_t row = 0;
  for (int64_t image = 0; row < rows; ++image) {
    const int64_t label = labels != nullptr ? labels[image] : image;
    for (int64_t view = 0; view < views && row < rows; ++view, ++row) {
      if (labels == nullptr || label != ignore_index) label_and_row.emplace_back(label, row);
    }
  }
  if (labels != nullptr) std::sort(label_and_row.begin(), label_and_row.end());
  Order order;
  order.source.reserve(label_and_row.size());
  order.label.reserve(label_and_row.size());
  for (const auto& [label, source] : label_and_row) {
    order.source.push_back(source);
    order.label.push_back(label);
  }
  return order;
}

Matches match(const Order& anchors, const Order& keys, const ContrastArgs& args) {
  const int64_t rows = anchors.size();
  Matches matches{std::vector<int64_t>(rows), std::vector<int64_t>(rows), std::vector<int64_t>(rows, -1)};
  int64_t begin = 0, end = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t label = anchors.label[i];
    while (begin < keys.size() && keys.label[begin] < label) ++begin;
    end = std::max(end, begin);
    while (end < keys.size() && keys.label[end] == label) ++end;
    matches.pos_begin[i] = begin;
    matches.pos_end[i] = end;
  }
  if (args.has_self) {
    std::vector<int64_t> place(args.num_keys, -1);
    for (int64_t j = 0; j < keys.size(); ++j) place[keys.source[j]] = j;
    for (int64_t i = 0; i < rows; ++i) matches.self[i] = place[anchors.source[i] + args.self_offset];
  }
  return matches;
}

template <class T>
void gather_rows(const Order& order, DType dtype, const void* in, int64_t stride, T* out) {
  with_element_type<BFloat16, Float16>(
      dtype, [&](auto element) { gather_as(order, static_cast<const decltype(element)*>(in), stride, out); });
}

template <class T>
void scatter_rows(const Order& order, const T* in, int64_t rows, int64_t stride, T* out) {
  if (order.size() < rows) std::memset(out, 0, sizeof(T) * rows * stride);
  torch::stable::parallel_for(0, order.size(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(out + order.source[i] * stride, in + i * stride, sizeof(T) * stride);
    }
  });
}

template void gather_rows(const Order&, DType, const void*, int64_t, float*);
template void gather_rows(const Order&, DType, const void*, int64_t, double*);
template void scatter_rows(const Order&, const float*, int64_t, int64_t, float*);
template void scatter_rows(const Order&, const double*, int64_t, int64_t, double*);

}  // namespace clce::cpu

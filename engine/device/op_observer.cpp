#include "engine/device/op_observer.h"

#include <algorithm>
#include <string_view>

#include "engine/clock.h"

namespace kava {

Segments TensorMap::operator()(Segments s) const {
  for (Tensor* t : {&s.key_offsets, &s.keys, &s.query_begin, &s.query_count, &s.group_offsets}) *t = (*this)(*t);
  return s;
}

Dropout TensorMap::operator()(Dropout d) const {
  d.row_keys = (*this)(d.row_keys);
  return d;
}

RkvOptions TensorMap::operator()(RkvOptions o) const {
  o.samples = (*this)(o.samples);
  return o;
}

LinearGroup TensorMap::operator()(LinearGroup g) const {
  for (Tensor* t : {&g.joined, &g.bias, &g.a}) *t = (*this)(*t);
  for (LinearPart& p : g.parts) p.b = (*this)(p.b);
  return g;
}

LinearGroupGrad TensorMap::operator()(LinearGroupGrad g) const {
  for (Tensor* t : {&g.dw, &g.dbias, &g.da}) *t = (*this)(*t);
  for (Tensor& t : g.db) t = (*this)(t);
  return g;
}

double OpCall::bytes() const {
  double sum = -untouched;
  for (const Tensor& t : outputs) sum += bytes_of(t);
  for (const Tensor& t : inputs)
    if (std::ranges::none_of(outputs, [&](const Tensor& y) { return y.data == t.data; })) sum += bytes_of(t);
  return sum;
}

void OpCounter::before(const OpCall& call) {
  const std::string_view name = call.name;
  ++(name == "upload" ? counts_.uploads : name == "download" || name == "begin_download" ? counts_.reads : counts_.calls);
}

OpCounter::Counts OpCounter::counts() const {
  Counts c = counts_;
  c.launches = ops_.launches() - launches_before_;
  return c;
}

void OpTimer::before(const OpCall&) {
  ops_.finish();
  start_ = std::chrono::steady_clock::now();
}

void OpTimer::after(const OpCall& call) {
  ops_.finish();
  Time& t = times_[call.name];
  t.seconds += seconds_since(start_);
  t.flops += call.flops;
  ++t.calls;
}

}  // namespace kava

#include "tools/report_plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace kava::report {

namespace {

constexpr double kWidth = 720, kHeight = 260, kLeft = 64, kRight = 12, kTop = 12, kBottom = 34;
constexpr std::size_t kMostPoints = 600;  // of a line
constexpr int kLevels = 10;               // of a heat map, each side of 0
constexpr std::size_t kColours = 6, kDashes = 3;

// Each part's least and greatest, in their order.
std::vector<std::pair<double, double>> thinned(const std::vector<std::pair<double, double>>& points) {
  if (points.size() <= kMostPoints) return points;
  std::vector<std::pair<double, double>> out;
  const std::size_t parts = kMostPoints / 2;
  for (std::size_t p = 0; p < parts; ++p) {
    const auto begin = points.begin() + static_cast<std::ptrdiff_t>(p * points.size() / parts);
    const auto end = points.begin() + static_cast<std::ptrdiff_t>((p + 1) * points.size() / parts);
    auto [least, greatest] = std::minmax_element(begin, end, [](const auto& a, const auto& b) { return a.second < b.second; });
    if (greatest < least) std::swap(least, greatest);
    out.push_back(*least);
    if (greatest != least) out.push_back(*greatest);
  }
  return out;
}

// 1, 2 or 5 times a power of ten.
double round_step(double range, int parts) {
  const double raw = range / parts, power = std::pow(10.0, std::floor(std::log10(raw)));
  for (double m : {1.0, 2.0, 5.0})
    if (raw <= m * power) return m * power;
  return 10 * power;
}

struct Axis {
  double low = 0, high = 1, begin = 0, length = 1;
  bool log = false;

  double at(double v) const {
    const double a = log ? std::log10(low) : low, b = log ? std::log10(high) : high, x = log ? std::log10(v) : v;
    return begin + length * (x - a) / (b - a);
  }
  std::vector<double> ticks() const {
    std::vector<double> out;
    if (log) {
      const double from = std::floor(std::log10(low)), to = std::ceil(std::log10(high));
      const double step = std::max(1.0, std::ceil((to - from) / 6));
      for (double e = from; e <= to; e += step)
        for (double m : {1.0, 2.0, 5.0})
          if (const double v = m * std::pow(10.0, e); v >= low && v <= high && (m == 1 || to - from < 3)) out.push_back(v);
      return out;
    }
    const double step = round_step(high - low, 5);
    for (double k = std::ceil(low / step); k * step <= high + 1e-9 * step; ++k) out.push_back(k * step + 0.0);
    return out;
  }
};

std::string tick_text(double v) { return fmt::format("{:.4g}", v); }

// Where they are equal, or differ by so little that no step between them could be counted.
void widen(double& low, double& high) {
  const double size = std::max(std::abs(low), std::abs(high));
  if (high > low && high - low > 1e-9 * size) return;
  const double by = size > 0 ? size * 0.1 : 1;
  low -= by, high += by;
}

std::string axes(const Axis& x, const Axis& y, const std::string& y_name) {
  std::string out;
  for (double v : y.ticks())
    out += fmt::format("<path class=\"grid\" d=\"M{} {:.1f}H{}\"/><text class=\"tick end\" x=\"{}\" y=\"{:.1f}\">{}</text>", kLeft, y.at(v),
                       kWidth - kRight, kLeft - 6, y.at(v) + 4, tick_text(v));
  for (double v : x.ticks())
    out += fmt::format("<text class=\"tick mid\" x=\"{:.1f}\" y=\"{}\">{}</text>", x.at(v), kHeight - kBottom + 16, tick_text(v));
  return out + fmt::format(
                   "<text class=\"tick mid\" x=\"{}\" y=\"{}\">step</text><text class=\"tick mid\" transform=\"translate(12 {}) "
                   "rotate(-90)\">{}</text>",
                   (kLeft + kWidth - kRight) / 2, kHeight - 4, (kTop + kHeight - kBottom) / 2, html(y_name));
}

// The classes of the i-th line: colours, then the same ones dashed.
std::string look_of(std::size_t i) { return fmt::format("c{} d{}", i % kColours, i / kColours % kDashes); }

std::string legend(const std::vector<Series>& series) {
  std::string out = "<p class=\"legend\">";
  for (std::size_t i = 0; i < series.size(); ++i)
    if (!series[i].points.empty()) out += fmt::format("<span class=\"{}\"><i></i>{}</span>", look_of(i), html(series[i].name));
  return out + "</p>";
}

// The cells of one level as the strokes of one path, neighbours in a row joined, from end to begin by relative moves: large maps are many.
std::string level_path(const HeatMap& map, int level) {
  std::string d;
  auto level_of = [&](int r, int c) {
    const float v = map.values[static_cast<std::size_t>(r * map.columns + c)];
    return static_cast<int>(std::lround(std::clamp(v, -1.0F, 1.0F) * kLevels));
  };
  int x = 0, y = 0;  // where the last stroke ended
  for (int r = 0; r < map.rows; ++r)
    for (int c = 0; c < map.columns; ++c) {
      if (level_of(r, c) != level) continue;
      int end = c + 1;
      while (end < map.columns && level_of(r, end) == level) ++end;
      d += fmt::format("m{} {}h{}", c - x, r - y, end - c);
      x = c = end, y = r;
    }
  return d;
}

}  // namespace

std::string html(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '<') out += "&lt;";
    else if (c == '>') out += "&gt;";
    else if (c == '&') out += "&amp;";
    else if (c == '"') out += "&quot;";
    else if (static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t') out += ' ';
    else out += c;
  }
  return out;
}

std::string figure(const std::string& id, const std::string& title, const std::string& content, const std::string& about) {
  return fmt::format("<figure id=\"{}\"><figcaption>{}</figcaption>{}{}</figure>\n", html(id), html(title), content,
                     about.empty() ? "" : "<p class=\"about\">" + html(about) + "</p>");
}

std::string line_plot(const std::string& id, const std::string& title, const std::string& y_name, std::vector<Series> series, bool log) {
  double x0 = INFINITY, x1 = -INFINITY, y0 = INFINITY, y1 = -INFINITY;
  for (Series& s : series) {
    std::erase_if(s.points, [](const auto& p) { return !std::isfinite(p.first) || !std::isfinite(p.second); });
    for (const auto& [x, y] : s.points) x0 = std::min(x0, x), x1 = std::max(x1, x), y0 = std::min(y0, y), y1 = std::max(y1, y);
  }
  if (std::ranges::all_of(series, [](const Series& s) { return s.points.empty(); })) return "";
  log = log && y0 > 0;
  widen(x0, x1);
  if (!log && y0 > 0 && y0 < 0.5 * y1) y0 = 0;
  if (y0 == 0 && y1 == 0) y1 = 1;
  widen(y0, y1);
  const Axis x{x0, x1, kLeft, kWidth - kLeft - kRight, false}, y{y0, y1, kHeight - kBottom, -(kHeight - kTop - kBottom), log && y0 > 0};
  std::string svg =
      fmt::format("<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">", kWidth, kHeight, html(title)) + axes(x, y, y_name);
  for (std::size_t i = 0; i < series.size(); ++i) {
    if (series[i].points.empty()) continue;
    std::string d;
    const auto points = thinned(series[i].points);
    for (const auto& [px, py] : points) d += fmt::format("{}{:.1f} {:.1f}", d.empty() ? "M" : "L", x.at(px), y.at(py));
    svg += fmt::format("<path class=\"line {}\" d=\"{}\"/>", look_of(i), d);
    if (points.size() == 1)
      svg += fmt::format("<circle class=\"dot {}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\"/>", look_of(i), x.at(points[0].first),
                         y.at(points[0].second));
  }
  return figure(id, title, svg + "</svg>" + legend(series));
}

std::string bar_plot(const std::string& id, const std::string& title, const std::vector<Bar>& bars, bool centred) {
  if (bars.empty()) return "";
  double low = 0, high = 0;
  for (const Bar& b : bars) {
    if (b.measured) low = std::min({low, b.low, b.value}), high = std::max({high, b.high, b.value});
    for (double m : b.marks) high = std::max(high, m);
  }
  if (centred || high > low) widen(low, high);
  else high = low + 1;
  constexpr double kNames = 300, kRow = 24;
  const double height = kRow * static_cast<double>(bars.size()) + 30;
  const Axis x{low, high, kNames, kWidth - kNames - 60, false};
  std::string svg = fmt::format("<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">", kWidth, height, html(title));
  for (double v : x.ticks())
    svg += fmt::format("<path class=\"grid\" d=\"M{0:.1f} 4V{1}\"/><text class=\"tick mid\" x=\"{0:.1f}\" y=\"{2}\">{3}</text>", x.at(v),
                       height - 22, height - 6, tick_text(v));
  for (std::size_t i = 0; i < bars.size(); ++i) {
    const Bar& b = bars[i];
    const double y = 4 + kRow * static_cast<double>(i), middle = y + kRow / 2;
    svg += fmt::format("<text class=\"name end\" x=\"{}\" y=\"{}\">{}</text>", kNames - 8, middle + 4, html(b.name));
    if (b.measured) {
      if (centred) svg += fmt::format("<circle class=\"dot c0\" cx=\"{:.1f}\" cy=\"{}\" r=\"4\"/>", x.at(b.value), middle);
      else
        svg += fmt::format("<rect class=\"bar c0\" x=\"{:.1f}\" y=\"{}\" width=\"{:.1f}\" height=\"{}\"/>", x.at(0), y + 4,
                           std::max(0.5, x.at(b.value) - x.at(0)), kRow - 8);
      if (b.high > b.low) svg += fmt::format("<path class=\"whisker\" d=\"M{:.1f} {}H{:.1f}\"/>", x.at(b.low), middle, x.at(b.high));
      svg +=
          fmt::format("<text class=\"tick\" x=\"{:.1f}\" y=\"{}\">{:.2f}</text>", x.at(std::max(b.high, b.value)) + 6, middle + 4, b.value);
    }
    for (double m : b.marks) svg += fmt::format("<path class=\"mark\" d=\"M{:.1f} {}v{}\"/>", x.at(m), y + 2, kRow - 4);
  }
  return figure(id, title, svg + "</svg>");
}

std::string heat_maps(const std::string& id, const std::string& title, const std::string& about, const std::vector<HeatMap>& maps) {
  if (maps.empty()) return "";
  std::string out = "<div class=\"maps\">";
  for (const HeatMap& map : maps) {
    out += map.width > 0 ? fmt::format("<div style=\"width:{}px\">", map.width) : "<div style=\"width:100%\">";
    out += fmt::format("<svg class=\"map\" viewBox=\"0 -0.5 {} {}\" role=\"img\" aria-label=\"{}\"", map.columns, map.rows, html(map.name));
    out += map.height > 0 ? fmt::format(" preserveAspectRatio=\"none\" style=\"height:{}px\">", map.height) : ">";
    for (int level = -kLevels; level <= kLevels; ++level) {
      if (level == 0) continue;
      if (const std::string d = level_path(map, level); !d.empty())
        out += fmt::format("<path class=\"{}\" stroke-opacity=\"{:.1f}\" d=\"{}\"/>", level > 0 ? "hot" : "cold",
                           std::abs(level) / double{kLevels}, d);
    }
    out += "</svg><small>" + html(map.name) + "</small></div>";
  }
  return figure(id, title, out + "</div>", about);
}

}  // namespace kava::report

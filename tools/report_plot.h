// Figures of a report as plain SVG. Colours are classes and variables of the page (report_page.h), so that one figure serves light, dark
// and print. Every text is escaped here.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace kava::report {

std::string html(const std::string& text);

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;  // x ascending
};

/// <figure id=...> with axes, a legend and a line for each series. Long series are drawn by the least and greatest of equal parts. `log`:
/// the y axis is logarithmic where all values are positive. A series without a finite point is not drawn, and keeps its colour; empty where
/// none has one.
std::string line_plot(const std::string& id, const std::string& title, const std::string& y_name, std::vector<Series> series, bool log);

struct Bar {
  std::string name;
  double value = 0, low = 0, high = 0;  // low, high: ends of the interval
  bool measured = true;                 // else only the marks are drawn
  std::vector<double> marks;            // published values
};
/// Horizontal bars from 0, or points around 0 with `centred`. Empty without bars.
std::string bar_plot(const std::string& id, const std::string& title, const std::vector<Bar>& bars, bool centred);

struct HeatMap {
  std::string name;
  int rows = 0, columns = 0;
  std::vector<float> values;  // [rows, columns], -1 .. 1
  int width = 0, height = 0;  // in pixels; 0: the page's width; square cells
};
/// Maps in one figure, side by side where there is room. Empty without maps.
std::string heat_maps(const std::string& id, const std::string& title, const std::string& about, const std::vector<HeatMap>& maps);

/// <figure> around anything.
std::string figure(const std::string& id, const std::string& title, const std::string& content, const std::string& about = "");

}  // namespace kava::report

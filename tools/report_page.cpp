#include "tools/report_page.h"

#include "tools/report_plot.h"

namespace kava::report {

namespace {

constexpr const char* kStyle = R"(
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#5d6670;--rule:#dfe3e8;--c0:#1f6fd0;--c1:#d0541f;--c2:#2a8a4a;--c3:#8a4fc0;--c4:#b08a00;--c5:#0a8f96}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e9ec;--soft:#9aa4ae;--rule:#30363d;--c0:#6aa9ff;--c1:#ff9a62;--c2:#5fce86;--c3:#c79bff;--c4:#e2c04a;--c5:#4fd0d6}}
@media print{:root{color-scheme:light;--bg:#fff;--fg:#000;--soft:#444;--rule:#ccc;--c0:#1f6fd0;--c1:#d0541f;--c2:#2a8a4a;--c3:#8a4fc0;--c4:#b08a00;--c5:#0a8f96}figure,tr{break-inside:avoid}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:960px;margin:0 auto;padding:24px 16px}
h1{font-size:24px}h2{font-size:19px;border-bottom:1px solid var(--rule);padding-bottom:4px;margin-top:36px}
figure{margin:20px 0}figcaption{font-weight:600;margin-bottom:6px}svg{width:100%;height:auto;display:block}
.about,small{color:var(--soft);font-size:13px}table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
th,td{text-align:left;padding:3px 10px 3px 0;border-bottom:1px solid var(--rule);vertical-align:top;white-space:pre-wrap}
.grid{stroke:var(--rule);fill:none}.tick{fill:var(--soft);font-size:11px}.name{fill:var(--fg);font-size:12px}.end{text-anchor:end}.mid{text-anchor:middle}
.line{fill:none;stroke-width:1.5}.whisker{stroke:var(--fg);stroke-width:1.5;fill:none}.mark{stroke:var(--c1);stroke-width:3;fill:none}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.line{stroke:var(--c)}.dot,.bar{fill:var(--c)}.bar{fill-opacity:.75}.legend span{margin-right:16px;font-size:13px}
.legend i{display:inline-block;width:18px;height:0;border-top:3px solid var(--c);margin-right:5px;vertical-align:middle}
.line.d1{stroke-dasharray:7 3}.line.d2{stroke-dasharray:2 3}.legend .d1 i{border-top-style:dashed}.legend .d2 i{border-top-style:dotted}
.maps{display:flex;flex-wrap:wrap;gap:10px}.maps div{max-width:100%}.map{border:1px solid var(--rule)}
.hot,.cold{fill:none;shape-rendering:crispEdges}.hot{stroke:var(--c0)}.cold{stroke:var(--c1)}.right{color:var(--c2)}.wrong{color:var(--c1)}
)";

}  // namespace

std::string page(const std::string& title, const std::string& body) {
  return "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
         "content=\"width=device-width\">\n<title>" +
         html(title) + "</title><link rel=\"icon\" href=\"data:,\"><style>" + kStyle + "</style></head>\n<body><h1>" + html(title) +
         "</h1>\n" + body + "</body></html>\n";
}

std::string text_table(const std::vector<std::vector<std::string>>& rows) {
  std::string out = "<table>";
  for (std::size_t r = 0; r < rows.size(); ++r) {
    out += "<tr>";
    for (const std::string& cell : rows[r]) out += (r == 0 ? "<th>" : "<td>") + html(cell);
    out += "\n";
  }
  return out + "</table>\n";
}

}  // namespace kava::report

"""The look of the report page, inlined so that the page needs no other file."""

__all__ = ["STYLE"]

STYLE = """
:root {
  --ink: #1f2733; --soft: #5b6675; --line: #e3e7ee; --pale: #f5f7fa; --card: #ffffff;
  --accent: #2f5fd0; --good: #1d7f5c;
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--pale); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 40px 28px 72px; }
header { margin-bottom: 26px; }
header p { margin: 6px 0 0; color: var(--soft); max-width: 76ch; }
.brand { color: var(--accent); font-weight: 700; letter-spacing: .04em; font-size: 13px;
  text-transform: uppercase; }
h1 { font-size: 32px; line-height: 1.2; margin: 4px 0 0; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 0 0 4px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 22px 24px; margin: 18px 0; }
section > p { margin: 0 0 14px; color: var(--soft); max-width: 90ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr));
  gap: 14px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 16px 18px; }
.tile b { display: block; font-size: 25px; line-height: 1.25; font-weight: 650; }
.tile span { color: var(--soft); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr));
  gap: 18px; margin: 18px 0; }
.plots figure { margin: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; padding: 14px; }
.plots svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 13px;
  border-bottom: 1px solid var(--line); }
td { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .left { text-align: left; }
.wrap td, .wrap th { white-space: normal; vertical-align: top; text-align: left; }
#networks th:nth-child(2) { text-align: left; }
tr.more td { border-bottom-color: transparent; }
tr.base td { color: var(--soft); }
td.name { font-weight: 650; vertical-align: top; }
td.name small { display: block; font-weight: 400; color: var(--soft); }
td b { color: var(--good); }
details { margin-top: 6px; }
summary { cursor: pointer; color: var(--accent); font-weight: 600; }
pre { background: var(--pale); border: 1px solid var(--line); border-radius: 8px;
  padding: 14px 16px; overflow-x: auto; font-size: 13px; line-height: 1.45; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
a { color: var(--accent); text-decoration: none; }
footer { color: var(--soft); font-size: 13px; margin-top: 22px; }
@media print { body { background: white; } section, .tile { break-inside: avoid; } }
"""

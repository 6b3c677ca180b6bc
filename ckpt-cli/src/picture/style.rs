//! Colours and type of every report.

/// The only place with colours. Each kind of step has one, of like weight on a light and on a dark ground.
pub(super) const SHEET: &str = "
:root { --paper: #ffffff; --ink: #1c2330; --faint: #667085; --line: #d9dee7; --card: #f5f7fa;
  --load: #2f6fd0; --pull: #8a55c8; --exchange: #c8741a; --reload: #2b8a57; --other: #8a93a3; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161d; --ink: #e4e9f1; --faint: #98a2b3; --line: #2e3644;
  --card: #1a202a; --load: #6ea4f4; --pull: #b790ec; --exchange: #eda75a; --reload: #62c492; --other: #7c8696; --bad: #f07f73; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 24px; margin: 0 0 8px; } h2 { font-size: 17px; margin: 32px 0 8px; }
p { max-width: 80ch; margin: 6px 0; color: var(--faint); }
figure { margin: 8px 0; padding: 12px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 600; }
text { fill: var(--ink); } .tick { fill: var(--faint); font-size: 10px; }
.grid { stroke: var(--line); stroke-width: 1; } .box { fill: var(--paper); stroke: var(--line); }
.load { fill: var(--load); } .pull { fill: var(--pull); } .exchange { fill: var(--exchange); }
.reload { fill: var(--reload); } .other { fill: var(--other); }
.area { fill-opacity: 0.25; stroke-width: 1.5; }
.area.load { stroke: var(--load); } .area.pull { stroke: var(--pull); } .area.exchange { stroke: var(--exchange); }
.area.reload { stroke: var(--reload); } .area.other { stroke: var(--other); }
.flow { fill: none; stroke: var(--exchange); stroke-opacity: 0.6; } .flow.load { stroke: var(--load); }
.flow.pull { stroke: var(--pull); }
footer { margin-top: 40px; color: var(--faint); font-size: 12px; }
";

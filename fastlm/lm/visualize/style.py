"""The style sheet of page.py: light and dark, wide and narrow."""

STYLE = """\
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d5dae0; --card: #f6f8fa; --accent: #3b7dd8;
  --page: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ed; --soft: #9aa5b1; --line: #363d46; --card: #1b2027;
  --page: #12161b; } }
* { box-sizing: border-box; }
body { max-width: 76rem; margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--page); }
p { max-width: 46rem; }
h2 { margin: 2.5rem 0 .5rem; } h3 { margin: 1.8rem 0 .5rem; } h4 { margin: 1.2rem 0 .5rem; color: var(--soft); }
blockquote { margin: 1rem 0; padding: .2rem 1rem; border-left: 4px solid var(--accent); white-space: pre-wrap;
  overflow: auto; overflow-wrap: anywhere; max-height: 10.5rem; }
i, caption { font-style: normal; color: var(--soft); }
.heads { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); align-items: start; }
details { min-width: 0; padding: .6rem; border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
details[open] { grid-column: 1 / -1; }
summary { cursor: pointer; font-size: .9rem; list-style: none; }
summary::-webkit-details-marker { display: none; }
.share { color: var(--soft); }
.bar { display: block; height: .3rem; margin: .3rem 0 .5rem; border-radius: .15rem; background: var(--line); }
.bar span { display: block; height: 100%; border-radius: .15rem; background: var(--accent); }
.plot, .table { overflow-x: auto; }
svg { display: block; width: 100%; font: 11px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg rect { fill: none; stroke: var(--line); } svg image { image-rendering: pixelated; }
.plot svg { overflow: visible; }
.few .plot svg { width: calc(100% - 5.5rem); max-width: calc(var(--width) * 1.25); margin: 5.5rem 0 0 5.5rem; }
details[open] .plot svg { width: calc(var(--width) * 1.25); max-width: none; margin: 5.5rem 1rem 0 5.5rem; }
.many details:not([open]) text { display: none; }
table { margin: 1rem 0; border-collapse: collapse; font-size: .9rem; }
caption { padding: .3rem 0; text-align: left; white-space: nowrap; font-weight: 600; }
th, td { padding: .25rem .6rem; border-top: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
.table td { white-space: nowrap; }
.traversals td { overflow-wrap: anywhere; }
.glance td { padding: 0; text-align: center; background: rgb(59 125 216 / calc(.75 * var(--share))); }
.glance a { display: block; padding: .25rem .6rem; color: inherit; text-decoration: none; }
.glance a:hover, .glance a:focus-visible { outline: 2px solid var(--ink); outline-offset: -2px; }
.glance i { display: block; font-size: .75rem; color: inherit; opacity: .75; }
.glance th[scope="col"] { text-align: center; }
svg.strip { height: 2.6rem; border-bottom: 1px solid var(--line); } .strip path { fill: var(--accent); }
.reader { border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
.reader > * { padding: .6rem .8rem; margin: 0; } .found:empty { padding: 0; }
.controls { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: baseline; border-bottom: 1px solid var(--line); }
.controls[hidden] { display: none; }
.controls span { color: var(--soft); font-size: .9rem; }
.tokens { max-height: 24rem; overflow-y: auto; line-height: 1.75; position: relative; overflow-wrap: anywhere; }
.tokens span { margin: 0 1px; padding: 0 2px; border: 1px solid var(--line); border-radius: .25rem;
  background: rgb(59 125 216 / calc(.85 * var(--weight, 0))); }
.tokens .key { font-style: italic; } .tokens [role] { cursor: pointer; } .tokens [aria-disabled] { cursor: default; }
.tokens [aria-selected="true"], .tokens span:focus-visible { outline: 2px solid #e07b39; outline-offset: 0; }
.found { border-top: 1px solid var(--line); font-size: .9rem; } .found p { margin: .2rem 0; }
.found ol { display: flex; flex-wrap: wrap; gap: .3rem .9rem; margin: .3rem 0; padding: 0; list-style: none; }
.found button { padding: 0 .4rem; border: 1px solid var(--line); border-radius: .25rem; font: inherit; color: inherit;
  background: var(--page); cursor: pointer; }
.map { border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
.map circle { fill: currentColor; fill-opacity: .8; } .map .other { fill-opacity: .4; }
.map .sentence { fill: none; stroke: var(--ink); stroke-width: 3; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; font-size: .9rem; }
.legend span { display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem; border-radius: 50%;
  background: currentColor; }
.label0 { color: #3b7dd8; } .label1 { color: #e07b39; } .label2 { color: #3a9d6c; } .label3 { color: #d1495b; }
.label4 { color: #8e6bc4; } .label5 { color: #a8763e; } .label6 { color: #d66aa8; } .label7 { color: #2aa5b3; }
.other { color: #98a1ab; }
@media (max-width: 40rem) { .many { grid-template-columns: 1fr 1fr; gap: .5rem; } }
"""

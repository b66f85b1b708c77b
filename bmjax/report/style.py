"""How the page looks: one style sheet, and the colours that its figures share with it.

Matplotlib draws in the light colours; the page's figures name the variables instead, so that one drawing serves light,
dark and paper.
"""

LIGHT = {
    "ink": "#1b2126", "muted": "#5d6872", "line": "#d8dde2", "raw": "#c3cbd3", "paper": "#fefefd", "panel": "#f4f6f5",
    "backbone": "#7d8791", "branch": "#3f7fc4", "merge": "#8fc3b2", "merged": "#0b7c61", "mixture": "#cf7d22",
    "line0": "#2f74bd", "line1": "#b1417d", "line2": "#8a7206", "line3": "#5b51b5", "line4": "#b4532a",
}  # fmt: skip
DARK = {
    "ink": "#e6eaed", "muted": "#9aa6b1", "line": "#333c44", "raw": "#4a555f", "paper": "#14181b", "panel": "#1c2226",
    "backbone": "#8d98a3", "branch": "#6ba7e8", "merge": "#3e7d6b", "merged": "#39d0a4", "mixture": "#eda04a",
    "line0": "#6cabf0", "line1": "#ea86b8", "line2": "#d5bb4a", "line3": "#a9a0f4", "line4": "#ef9a70",
}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


CSS = (
    f"""
:root{{color-scheme:light dark;{_variables(LIGHT)}}}
@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}
"""
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
 font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.05rem;font-weight:600;color:var(--muted);margin:0 0 .6rem}
h2{font-size:1.25rem;line-height:1.3;margin:3.2rem 0 .5rem;padding-top:1rem;border-top:1px solid var(--line)}
p{max-width:46rem;margin:.5rem 0}
.headline p:first-of-type{font-size:1.5rem;line-height:1.3;font-weight:600;letter-spacing:-.01em;max-width:52rem;
 margin:0 0 .8rem}
.note,figcaption{color:var(--muted);font-size:.9rem}
.missing{border-left:3px solid var(--mixture);padding-left:.7rem;color:var(--muted);font-size:.9rem;
 overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:1rem 0 .5rem}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
.wide{width:100%}
th,td{padding:.34rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;padding-left:.2rem;position:sticky;left:0;background:var(--paper)}
thead th{font-weight:600;color:var(--muted);vertical-align:bottom;white-space:normal}
tbody th{font-weight:500}
thead .group{text-align:center;color:var(--ink)}
thead th:empty{border-bottom-color:transparent}
.first{padding-left:1.5rem}
td.text{text-align:left}
td .half{color:var(--muted);font-size:.85em}
td.best{font-weight:700}
td.best::after{content:"*";position:absolute}
tr.merged>*{background:var(--panel)}
tr.merged th{font-weight:700}
.key{display:inline-block;width:.65em;height:.65em;border-radius:2px;margin-right:.5em}
.key.backbone{background:var(--backbone)}.key.branch{background:var(--branch)}.key.merge{background:var(--merge)}
.key.merged{background:var(--merged)}.key.mixture{background:var(--mixture)}
.share{display:inline-block;width:6rem;height:.6em;background:var(--line);margin-left:.6em;vertical-align:baseline}
.share i{display:block;height:100%;background:var(--branch)}
figure{margin:1.2rem 0 0}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,325px),1fr));gap:.6rem 1.2rem;
 align-items:start}
.panels.broad{grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),460px))}
svg{display:block;width:100%;height:auto}
svg text{font-family:inherit!important}
figcaption{max-width:46rem;margin-top:.5rem}
blockquote{margin:.8rem 0;padding:.1rem 0 .1rem 1rem;border-left:3px solid var(--line);max-width:46rem}
details{margin:1rem 0}
summary{cursor:pointer;color:var(--muted)}
pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--panel);padding:1rem;
 overflow-x:auto}
@media(max-width:520px){main{padding:1.5rem .9rem 3rem}.headline p:first-of-type{font-size:1.22rem}
th,td{padding:.34rem .5rem}}
@media print{
@page{margin:14mm}
html{font-size:10pt}main{max-width:none;padding:0}
h2{margin-top:1.6rem;break-after:avoid}
svg,tr,blockquote{break-inside:avoid}
table{font-size:7.6pt}th,td{padding:.2rem .35rem}.first{padding-left:.7rem}
.scroll{overflow:visible}
.panels{grid-template-columns:repeat(2,1fr)}
.panels.broad{grid-template-columns:1fr}.panels.broad svg{max-width:12cm}
pre{white-space:pre-wrap}
.key,.share,.share i,tr.merged>*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""
)

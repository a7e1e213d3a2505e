#!/bin/sh
# Makes a comment, in Markdown, of what `cedarpost impact -o json` prints:
#
#   cedarpost impact policies/shop --since 24h -o json | ci/comment.sh shop >comment.md
#
# It shows counts. SAMPLES=5 shows five samples besides: they name users and objects, so ask first who reads
# the comments. Needs jq.
set -eu

[ $# -eq 1 ] || {
    echo "usage: comment.sh BUNDLE <impact.json" >&2
    exit 2
}

exec jq --slurp --raw-output --arg bundle "$1" --argjson samples "${SAMPLES:-0}" '
def count(name):
  (.[name] | if . == null then error("the impact has no count " + name) else tonumber end)
  | if . != floor or . < 0 then error(name + " is no count") else . end;
def text: gsub("\\s+"; " ") | @html | gsub("\\|"; "&#124;") | gsub("`"; "&#96;") | gsub("@"; "&#64;");

if length != 1 then error("expected one object, got \(length)") else .[0] end
| [count("allowToDeny"), count("denyToAllow"), count("fieldsGained"), count("fieldsLost"), count("newErrors")] as [$lost, $gained, $more, $fewer, $errors]
| count("unchanged") as $same
| count("unknown") as $unknown
| "<!-- cedarpost-impact \($bundle | text) -->",
  "### Impact on \($bundle | text)",
  "",
  (if $lost + $gained + $more + $fewer + $errors == 0 then "No recorded decision would change."
   else "Recorded decisions would change:" end),
  "",
  "| decisions | count |",
  "|---|---:|",
  "| allow → deny | \($lost) |",
  "| **deny → allow** | **\($gained)** |",
  "| **fields gained** | **\($more)** |",
  "| fields lost | \($fewer) |",
  "| new errors | \($errors) |",
  "| unchanged | \($same) |",
  "| unknown | \($unknown) |",
  (if $unknown > 0 then "", "Unknown: the recorded values are masked, or the data of that time is swept." else empty end),
  (if $samples > 0 and (.samples // [] | length) > 0 then
     "", "<details><summary>Samples</summary>", "", "<pre>",
     (.samples[:$samples][] | tojson | text),
     "</pre>", "</details>"
   else empty end)
'

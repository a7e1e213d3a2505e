#!/usr/bin/env bash
# Installs what `cedarpost check --prove` needs into a folder: Cedar's command line with its analysis, built
# with Rust in some minutes, and the solver cvc5, from PyPI. Prints the variables to set.
set -euo pipefail
dir=$(realpath -m "${1:-.build/cedar-analysis}")
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$dir"
[ -x "$dir/bin/cedar" ] || CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --debug --locked --root "$dir" --version 4.14.1 cedar-policy-cli --features analyze
[ -x "$dir/python/bin/python" ] || python3 -m venv "$dir/python"
"$dir/python/bin/pip" install --quiet --disable-pip-version-check cvc5==1.4.2
cat > "$dir/bin/cvc5" <<EOF
#!/bin/sh
exec "$dir/python/bin/python" "$here/cvc5-stdin.py" "\$@"
EOF
chmod +x "$dir/bin/cvc5"
echo "CEDARPOST_CEDAR=$dir/bin/cedar"
echo "CVC5=$dir/bin/cvc5"

#!/usr/bin/env bash
# Set up, then take a generated catalogue through every stage: bash launch/demo.sh [options]
#
# The options are those of `dist-train demo`. Without --out the results go to demo/ here.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$launch/setup.sh"
source "$launch/environment.sh"

case " $* " in
*" --out"[\ =]* | *" --help "* | *" -h "*) ;;
*) set -- --out "$(dirname "$launch")/demo" "$@" ;;
esac
exec dist-train demo "$@"

#!/usr/bin/env bash
# Build the sdist and the wheel from the tracked files:  scripts/build.sh [FOLDER]
#
# FOLDER is dist by default. The archives are the same bytes wherever and whenever they are
# built, given the commit and the versions in requirements/build.txt: only the files'
# contents and executable bits, and the last commit's date, go into them.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
mkdir -p "${1:-dist}"
out=$(realpath "${1:-dist}")
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022

# An archive of the files listed in $2, below the folder $1, that tells nothing of this
# machine.
pack() {
  tar -C "$1" --null --verbatim-files-from --files-from="$2" --format=posix \
    --pax-option=delete=atime,delete=ctime --mtime="@$SOURCE_DATE_EPOCH" \
    --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX -c
}

mkdir "$work/source" "$work/sdist"
git ls-files -z > "$work/tracked"
pack . "$work/tracked" | tar -C "$work/source" -x
# Without isolation, so that the build needs no network. The wheel is built from the sdist.
"$python" -m build --no-isolation --outdir "$work/built" "$work/source" > "$work/log" 2>&1 ||
  { cat "$work/log" >&2; exit 1; }

# setuptools leaves the time of the build in an sdist, so it is packed once more.
sdist=$(basename "$work"/built/*.tar.gz)
tar -C "$work/sdist" -xf "$work/built/$sdist"
(cd "$work/sdist" && find . -type f -printf '%P\0' | LC_ALL=C sort -z) > "$work/packed"
pack "$work/sdist" "$work/packed" | gzip -9n > "$out/$sdist"
cp "$work"/built/*.whl "$out"
(cd "$out" && sha256sum "$sdist" "$(basename "$work"/built/*.whl)")

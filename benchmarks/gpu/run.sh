#!/bin/sh
# Runs benchmarks.gpu from the folder that `make gpu-bundle` wrote. It needs no network.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ ! -d "$here/contents" ]; then
  rm -rf "$here/part"
  python3 -m tarfile -e "$here/contents.tar.xz" "$here/part"
  mv "$here/part/contents" "$here/contents"
  rmdir "$here/part"
fi
export PYTHONPATH="$here/contents/project:$here/contents/site-packages${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1
cd "$here/contents/project"
exec python3 -m benchmarks.gpu "$@"

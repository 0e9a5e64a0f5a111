#!/bin/sh
# Distils a checkpoint: makes a Python environment of its own the first time (.venv, beside this file), then
# runs python -m toolkit.distill with what is typed behind: ./distill.sh --ckpt model.safetensors --steps 4
here=$(cd -- "$(dirname -- "$0")" && pwd) || exit 1
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
for python in python3 python3.13 python3.12 python3.11 python; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        exec "$python" -m toolkit.start distill "$@"
    fi
done
echo "fewstep: no Python 3.11 or newer was found; install one (Debian, Ubuntu: apt install python3-venv)" >&2
exit 2

#!/usr/bin/env bash
# 200 SIGKILLs at random moments of a saving run: `bash tests/soak.sh [--kills N] [--minutes M]`.
# It takes an hour or so; cut into several calls (--minutes), it goes on where it was. See soak.py.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=slurm/env.sh
source slurm/env.sh --test
exec "$PYTHON" -m tests.soak "$@"

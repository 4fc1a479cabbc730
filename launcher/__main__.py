"""`tiny-onn VERB …`, the same as `python -m launcher VERB …`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.redact import guard_output, redact

VERBS = {
    "pretrain": ("launcher.pretrain", "train a model, or go on with a run that was interrupted"),
    "data": ("launcher.data_verbs", "build a corpus of shards, or look into one"),
    "checkpoint": ("launcher.checkpoint_verbs", "list or verify a run's checkpoints"),
    "eval": ("launcher.eval_verb", "validation loss of a checkpoint"),
    "generate": ("launcher.generate_verb", "text from a checkpoint"),
    "plan": ("launcher.plan_verb", "memory, traffic and time of a step, before it runs"),
    "bench": ("launcher.bench_verbs", "measure the parts on this machine"),
    "doctor": ("launcher.doctor", "check this machine and say what to do"),
    "preflight": ("launcher.preflight", "check one node of a Slurm job before its ranks start"),
    "path": ("launcher.path_verb", "print the run folder of a configuration"),
}


def usage() -> str:
    """Return the overview of all verbs."""
    rows = "\n".join(f"  {verb:<12}{what}" for verb, (_, what) in VERBS.items())
    return (
        "usage: tiny-onn VERB [arguments]\n\n"
        f"{rows}\n\n"
        "Every verb has --help and an example. First:  tiny-onn pretrain launcher/configs/demo.yaml"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the process's exit code (0 done, 1 failed, 2 used wrongly)."""
    # `kernels` is also the name of a third-party package: the checkout's must win over it.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    guard_output()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        print(f"tiny-onn: unknown verb '{verb}'\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(VERBS[verb][0])
    try:
        return int(module.main(rest))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as e:
        if "TINY_ONN_TRACEBACK" in os.environ:
            raise
        print(redact(f"tiny-onn {verb}: {e}"), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

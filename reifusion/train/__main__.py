"""`reifusion train …`, also as `python -m reifusion.train …`."""

import sys

USAGE = "usage: reifusion train mini [--help]   trains the built-in model from nothing"


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 done, 1 the work failed, 2 the input was wrong."""
    if arguments and arguments[0] == "mini":
        from .mini import main as train_mini

        return train_mini(arguments[1:])
    if arguments in (["--help"], ["-h"]):
        print(USAGE)
        return 0
    print(f"reifusion: say what to train; {USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

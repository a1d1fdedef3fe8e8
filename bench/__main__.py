"""`python -m bench` times; `... compare OLD NEW`, `... report FILE`, `... accuracy` besides."""

import sys

from bench import report


def main(argv: list[str]) -> int:
    """Hand the command line to the subcommand it names; without one, time."""
    if argv[:1] == ["compare"]:
        return report.compare(argv[1:])
    if argv[:1] == ["report"]:
        report.main(argv[1:])
    elif argv[:1] == ["accuracy"]:
        from bench import accuracy

        return accuracy.main(argv[1:])
    else:
        from bench import run

        return run.main(argv)
    return 0


sys.exit(main(sys.argv[1:]))

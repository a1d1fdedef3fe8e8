"""`python -m bench` times; `... accuracy`, `precompile`, `compare`, `report`, `pages` besides."""

import sys

from bench import pages, report


def main(argv: list[str]) -> int:
    """Hand the command line to the subcommand it names; without one, time."""
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name == "compare":
        return report.compare(rest)
    if name == "report":
        report.main(rest)
        return 0
    if name == "pages":
        return pages.main(rest)
    if name == "accuracy":
        from bench import accuracy

        return accuracy.main(rest)
    if name == "precompile":
        from bench import precompile

        return precompile.main(rest)
    from bench import run

    return run.main(argv)


sys.exit(main(sys.argv[1:]))

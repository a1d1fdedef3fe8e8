"""`python -m bench` times; `... accuracy`, `decode`, `precompile`, `report`, `pages` besides."""

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
    if name == "decode":
        from bench import decode

        return decode.main(rest)
    if name == "precompile":
        from bench import precompile

        return precompile.main(rest)
    from bench import run

    if name and not name.startswith("-"):
        raise SystemExit(f"want one of {', '.join(run.OTHERS)}, or options, got {name!r}; --help")
    return run.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m bench` times; `... compare OLD NEW` compares; `... report FILE` makes tables."""

import sys

from bench import report, run

if len(sys.argv) > 1 and sys.argv[1] == "compare":
    sys.exit(report.compare(sys.argv[2:]))
elif len(sys.argv) > 1 and sys.argv[1] == "report":
    report.main(sys.argv[2:])
else:
    run.main()

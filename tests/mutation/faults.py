"""The planted faults: one edit each, of the kind that gives wrong numbers without a word.

`run.py` plants them one at a time in a copy of the sources and expects the tests to fail. Every
`old` text occurs exactly once in its file (tests/mutation/test_list.py checks), so that a rewrite
of a kernel must bring its faults along.
"""

import faults_cuda
import faults_few
import faults_hopper
import faults_hopper_one_pass
import faults_hopper_steps
import faults_python

FAULTS = (
    *faults_python.FAULTS,
    *faults_cuda.FAULTS,
    *faults_few.FAULTS,
    *faults_hopper.FAULTS,
    *faults_hopper_one_pass.FAULTS,
    *faults_hopper_steps.FAULTS,
)

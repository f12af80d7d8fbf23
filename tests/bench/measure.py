"""Runs a command and prints what it took as JSON: `seconds` of wall time, `peak_bytes` resident, and its `status`.

    python measure.py PROGRAM [ARGUMENT...]

Its output goes where this script's standard error goes.
"""

import json
import resource
import subprocess
import sys
import time

begun = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode
seconds = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_bytes": peak, "status": status}))

"""Runs `full_disk_here`, in the namespace it was started in; prints what it has seen as JSON."""

import json
import sys
from pathlib import Path

from tests.faults.scenarios import full_disk_here
from tests.faults.training import Training

if __name__ == "__main__":
    folder, output, data, back_end, steps = sys.argv[1:]
    reference = Training(back_end, Path(data), Path(output), int(steps))
    print(json.dumps(full_disk_here(reference, Path(folder))))

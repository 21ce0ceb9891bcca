import subprocess
import sys

import pytest

# In a process of its own, where no other live block lies in the heap.
SCRIPT = """
from gmarpp.run.memory import return_free_memory

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

blocks = [bytearray(b"x" * 100_000) for _ in range(1000)]
del blocks[:-1]
kept = resident()
return_free_memory()
print(kept - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_free_below_a_live_block_goes_back_to_the_system():
    freed = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    assert int(freed) > 50_000  # KiB, of the 97,559 that were freed

"""What pytest collects beside `tests`: the doctests of modules that can be imported here."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["gmarpp/attribution/kernels.py"]

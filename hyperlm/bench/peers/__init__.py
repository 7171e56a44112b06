"""What hyperlm is compared with, and is no part of it: other architectures, one file each, that suites of bench.py train."""

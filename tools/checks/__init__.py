"""Each check of CHECKS (tools/check_device.py) is a function that returns its figures."""

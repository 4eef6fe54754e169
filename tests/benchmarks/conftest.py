"""What here needs torch is no part of the collected tests."""

collect_ignore = ["decode_speed.py"]

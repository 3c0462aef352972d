"""Files and folders that survive kills, full disks and second writers."""

"""What a launch started: devices and threads, whole or sharded networks, signals, and who does what."""

"""The worker's side of being supervised: telemetry, commands, stops, watchdogs."""

"""Less work for another picture: options that are off unless asked for. bench/SHORTCUTS.md has their prices."""

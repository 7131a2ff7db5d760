"""Less work, and another picture: options that are off by default. bench/SHORTCUTS.md has their prices."""

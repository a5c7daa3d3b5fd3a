"""Other projects' checkpoints <-> ours: one file per source, rules as tables, one engine."""

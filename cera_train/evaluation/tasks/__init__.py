"""One file a benchmark. A module of this folder that sets `TASK` is a `task.kind`; conf/task/ holds
its settings."""
